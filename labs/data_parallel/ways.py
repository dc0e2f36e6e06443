"""The ways to train, in groups.

``memory``      what a rank holds, in a row of strategies that shard more and more
``bytes``       what a rank communicates in a step, counted by a linked group
``step``        seconds of a step, ours and PyTorch's, over gloo and over shm (plain backends, nothing counts)
``replicas``    the whole batch on one replica, on replicas in threads of one process, on a process each
``straggler``   until a target loss, with ranks that are late now and then: synchronous, and local SGD
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.data_parallel import straggling
from labs.data_parallel.config import Config
from labs.data_parallel.holding import held
from labs.data_parallel.training import (
    OURS,
    TORCH,
    Training,
    adamw,
    batches,
    build,
    gpt,
)
from labs.lab import Recorder, Step, Variant

BACKENDS = ("gloo", "shm")
PROOF_STEPS = 3
MEMORY = ("single", *OURS)
BYTES = (*OURS, *TORCH)
REPLICAS = ("one_replica", "data_parallel", "ddp")
Setup = Callable[[Any, Recorder], Step]


class Run:
    """A training as a step to time. Its output is the proof: the parameters after ``PROOF_STEPS`` steps that
    its setup has made with the same function."""

    def __init__(self, training: Training, step: Callable[[], object] | None = None) -> None:
        self.training, self.step = training, step or training.step
        for _ in range(PROOF_STEPS):
            training.step()
        self.proof = training.parameters().clone()

    def __call__(self) -> Any:
        self.step()
        return self.proof

    def close(self) -> None:
        self.training.close()


def _memory(name: str) -> Setup:
    def setup(config: Config, recorder: Recorder) -> Step:
        training = build(config, name)

        def step() -> None:
            for part, count in held(training).items():
                recorder.record(part, count, "B")

        return Run(training, step)

    return setup


def _bytes(name: str) -> Setup:
    def setup(config: Config, recorder: Recorder) -> Step:
        from parallel import link

        training = build(config, name, link.wrap("gloo"))

        def step() -> None:
            with link.counted() as traffic:
                training.step()
            for operation, count in traffic.payload.items():
                recorder.record(operation, count, "B")
            recorder.record("communicated", sum(traffic.payload.values()), "B")

        return Run(training, step)

    return setup


def _step(name: str, backend: str) -> Setup:
    return lambda config, recorder: Run(build(config, name, backend))


def _replicas(name: str) -> Setup:
    """In one process: the whole batch, in as many threads as ranks have processes."""

    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        from parallel.replicas import DataParallel

        model = gpt(config.gpt())
        split = name == "data_parallel"
        forward = DataParallel(model, ["cpu"] * config.ranks) if split else model
        optimizer = torch.optim.AdamW(model.parameters(), **adamw())
        training = Training(forward, model, optimizer, batches(config, 0, 1))
        before = torch.get_num_threads()
        threads = max(1, before // config.ranks) if split else before

        def step() -> None:
            torch.set_num_threads(threads)  # of each replica; in all as many as there are cores
            try:
                training.step()
            finally:
                torch.set_num_threads(before)

        return Run(training, step)

    return setup


def step_names(config: Config) -> list[tuple[str, str, str]]:
    """(variant, strategy, backend) of the group ``step``."""
    return [
        ("single", "single", "gloo"),
        *((f"{name}_{backend}", name, backend) for backend in BACKENDS for name in (*OURS, *TORCH)),
    ]


def variants(config: Config) -> Sequence[Variant]:
    from labs.models.formulas import flops_per_token

    flops = float(flops_per_token(config.gpt(), config.length) * config.tokens)
    ranks = config.ranks
    found = [
        Variant("memory", name, _memory(name), processes=1 if name == "single" else ranks, max_rounds=1)
        for name in MEMORY
    ]
    found += [Variant("bytes", name, _bytes(name), processes=ranks, max_rounds=1) for name in BYTES]
    found += [
        Variant("step", variant, _step(name, backend), flops=flops, processes=ranks)
        for variant, name, backend in step_names(config)
    ]
    for name in REPLICAS:
        apart = name == "ddp"
        setup, processes = (_step("ddp", "gloo"), ranks) if apart else (_replicas(name), 1)
        found.append(Variant("replicas", name, setup, flops=ranks * flops, threads=0, processes=processes))
    found += [
        Variant("straggler", name, straggling.setup(name), processes=ranks, max_rounds=1)
        for name in straggling.WAYS
    ]
    return found
