"""The steps of a training run, each with what was counted of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from labs.machine import Machine, load_cached
from labs.models.text import Batches, standard_library
from labs.train.options import Options
from labs.train.strategies import Trainer, flops_per_token
from parallel import checkpoint, link, memory
from parallel.checkpoint import PerRank, RandomGenerators
from parallel.checkpoint_background import BackgroundSaver

MEMORY_STEPS = 2
"""Steps of a run whose memory is counted, which takes time: the first makes the optimizer's state, the second
is like all that follow."""


@dataclass(frozen=True)
class StepReport:
    """One step, as this rank saw it; loss is that of the whole batch before the step.

    communicated_bytes: payload of this rank's calls. exposed_seconds: it was blocked in communication.
    peak_bytes: the most that torch held at once in the last step whose memory was counted; counted: this is
    one, and its times are longer for that.
    mfu: share of the ranks' peak FLOP/s that the model's own FLOPs make up; None where no peak is known.
    """

    step: int
    loss: float
    seconds: float
    tokens: int
    communicated_bytes: int
    exposed_seconds: float
    peak_bytes: int
    counted: bool
    mfu: float | None

    def line(self, steps: int) -> str:
        parts = [
            f"step {self.step}/{steps}",
            f"loss {self.loss:.4f}",
            f"{self.tokens / self.seconds:,.0f} tokens/s",
            "MFU unknown (perflab calibrate)" if self.mfu is None else f"MFU {self.mfu:.1%}",
            f"communicated {self.communicated_bytes / 1e6:.3f} MB",
            f"peak memory {self.peak_bytes / 1e6:.2f} MB",
            f"exposed {self.exposed_seconds * 1e3:.1f} of {self.seconds * 1e3:.1f} ms",
            *(["(slower: its memory was counted)"] if self.counted else []),
        ]
        return "  ".join(parts)


def peak_flops(device: torch.device, processes: int) -> float | None:
    """What the ranks could compute in float32 per second: the cores that they share, or one GPU each."""
    machine = load_cached()
    if machine is None:
        return None
    if device.type == "cuda":
        return _peak(machine.gpu, processes) if machine.gpu else None
    return _peak(machine, 1)


def _peak(machine: Machine, times: int) -> float | None:
    try:
        return times * machine.peak("float32", unit="matrix", threads=0)
    except ValueError:
        return None


def resume(options: Options, trainer: Trainer) -> int:
    """Steps that are done: those of the newest checkpoint, whose state is then the trainer's, or none."""
    if not options.resume or not checkpoint.latest(options.checkpoint):
        return 0
    state = trainer.checkpointed.capture()
    step = checkpoint.load(options.checkpoint, _state(state))
    trainer.checkpointed.restore(state)
    return step


def _state(training: dict[str, Any]) -> dict[str, Any]:
    return {"training": training, "generators": PerRank(RandomGenerators())}


def train(options: Options, trainer: Trainer, device: torch.device, done: int = 0) -> Iterator[StepReport]:
    """Run the steps after ``done``; checkpoints are written as the options say."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share, shares = (rank, world) if trainer.shares > 1 else (0, 1)
    text = standard_library().train
    batches = Batches(text, options.batch, options.length, options.seed, share, shares)
    peak = peak_flops(device, world)
    flops = flops_per_token(options) * options.batch * options.length
    held = trainer.checkpointed.held_bytes() + trainer.buffer_bytes
    peak_bytes = 0
    saver = BackgroundSaver() if options.background_save else None
    save = checkpoint.save if saver is None else saver.save
    for step in range(done, options.steps):
        tokens, targets = (tensor.to(device) for tensor in batches[step])
        counted = step - done < MEMORY_STEPS
        start = time.perf_counter()
        with link.counted() as traffic:
            if counted:
                with memory.tracked(device) as tracker:
                    loss = trainer.step(tokens, targets)
                peak_bytes = held + tracker.peak_bytes
                held += tracker.live_bytes
            else:
                loss = trainer.step(tokens, targets)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        loss = loss.float()
        dist.all_reduce(loss)
        yield StepReport(
            step + 1,
            loss.item() / world,
            seconds,
            options.batch * options.length,
            sum(traffic.payload.values()),
            traffic.waited_seconds,
            peak_bytes,
            counted,
            flops / seconds / peak if peak else None,
        )
        if options.checkpoint and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            save(options.checkpoint, step + 1, _state(trainer.checkpointed.capture()))
    if saver is not None:
        saver.close()
