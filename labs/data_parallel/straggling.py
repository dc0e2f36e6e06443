"""Training to a target loss while ranks are late now and then: synchronous steps against local SGD.

A rank that is late sleeps (a virtual delay: the processor is free meanwhile), independently in each step and
on each rank. The loss is the validation loss of rank 0's model, taken where all ranks have the same one:
every ``local_steps`` steps, in both ways. Its time is no part of a step's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from labs.data_parallel.config import Config
from labs.data_parallel.training import LEARNING_RATE, gpt, loss_of
from labs.lab import Recorder, Step

if TYPE_CHECKING:
    import torch

    from parallel.straggler import Straggler

WAYS = ("synchronous", "local_sgd")
RATE = 3 * LEARNING_RATE
SEED = 1


def straggler(config: Config) -> Straggler:
    from parallel.straggler import Occasional, Straggler

    return Straggler(Occasional(config.late_probability, config.late_s), SEED)


def share(config: Config, rank: int) -> Any:
    """``share(config, rank)[step]`` is the rank's batch of a step."""
    from labs.models.text import Batches, standard_library

    whole = config.ranks * config.sequences
    return Batches(standard_library().train, whole, config.length, SEED, rank, config.ranks)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


def vector(model: Any) -> torch.Tensor:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def setup(name: str) -> Callable[[Config, Recorder], Step]:
    def made(config: Config, recorder: Recorder) -> Step:
        _train(name, config, 2 * config.local_steps, recorder=None)  # warm; nobody is late
        return lambda: _train(name, config, config.most_steps, recorder)

    return made


def _train(name: str, config: Config, most_steps: int, recorder: Recorder | None) -> torch.Tensor:
    """Train to the target, or for ``most_steps``; records the time to it and of a step.

    Returns the parameters after the first ``local_steps`` steps: proof material.
    """
    import torch
    import torch.distributed as dist

    from labs.models.text import Batches, standard_library
    from parallel.data import DistributedDataParallel
    from parallel.local_sgd import LocalSGD

    rank, late = dist.get_rank(), straggler(config)
    model = gpt(config.small_gpt())
    forward: Any = model
    optimizer: Any = optimizer_of(model)
    if name == "synchronous":
        forward = DistributedDataParallel(model)
    else:
        optimizer = LocalSGD(model, optimizer, every=config.local_steps)
    drawn = share(config, rank)
    validation = Batches(standard_library().validation, 16, config.length, SEED)[0]
    rounds = max(1, most_steps // config.local_steps)
    proof, loss = torch.empty(0), float("inf")
    steps = 0
    dist.barrier()
    begin, evaluating = recorder.now() if recorder else 0.0, 0.0
    for number in range(rounds):
        for steps in range(number * config.local_steps + 1, (number + 1) * config.local_steps + 1):
            if recorder:
                late.wait(rank, steps)
            optimizer.zero_grad()
            loss_of(forward, drawn[steps]).backward()
            optimizer.step()
        paused = recorder.now() if recorder else 0.0
        if number == 0:
            proof = vector(model).clone()
        with torch.no_grad():
            measured = loss_of(model, validation)
        dist.broadcast(measured, 0)  # all end in the same round
        loss = float(measured)
        evaluating += recorder.now() - paused if recorder else 0.0
        if loss <= config.target_loss:
            break
    if recorder:
        seconds = recorder.now() - begin - evaluating
        recorder.record("step", seconds / steps, "s")
        recorder.record("steps", steps, "")
        recorder.record("loss", loss, "nats")
        if loss <= config.target_loss:
            recorder.record("target", seconds, "s")
    return proof
