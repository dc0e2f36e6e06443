"""A schedule run on ranks: real stages or virtual devices, timed as a whole; and once, action by action."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from labs.lab import Recorder, Step
from labs.pipeline import lost_time, real_stages, simulated

if TYPE_CHECKING:
    from labs.pipeline.config import Config
    from parallel.pipeline import Pipeline
    from parallel.schedules import Action, Schedule

VIRTUAL = "virtual"
PROOF_NUMBERS = 100_000  # of all gradients that are shown


def virtual_pipeline(config: Config, schedule: Schedule) -> tuple[Pipeline, Any, Any]:
    """(pipeline, inputs, targets) of virtual devices."""
    import torch

    from parallel.pipeline import Pipeline
    from parallel.virtual import virtual_stages

    unit = simulated.virtual_unit(config, schedule)
    stages = virtual_stages(schedule.stages, unit, unit, unit)
    inputs = torch.arange(1.0, schedule.microbatches + 1).view(-1, 1)
    return Pipeline(stages, schedule, torch.nn.functional.mse_loss), inputs, torch.zeros_like(inputs)


def real_pipeline(config: Config, model: str, schedule: Schedule) -> tuple[Pipeline, Any, Any]:
    """(pipeline, inputs, targets) of a real model."""
    from parallel.pipeline import Pipeline

    stages = real_stages.stages_of(config, model, schedule.stages)
    inputs, targets = real_stages.batch(config, model, schedule.microbatches)
    return Pipeline(stages, schedule, real_stages.loss), inputs, targets


class Run:
    """A pipeline's step, to be timed. Its output is the proof: losses and the gradients of rank 0 (float64)
    after one step, made in setup by the same function.

    Setup also notes, action by action, when each rank did what in a step, what it waited for, and how many
    activations it held.
    """

    def __init__(
        self, pipeline: Pipeline, inputs: Any, targets: Any, recorder: Recorder, counts_bytes: bool
    ) -> None:
        self.pipeline, self.inputs, self.targets = pipeline, inputs, targets
        losses = self.step()
        self.proof = proof_of(losses, list(pipeline.parameters()))
        self._record_times(recorder)
        self._record_held(recorder, counts_bytes)

    def step(self, record: Any = None) -> Any:
        for parameter in self.pipeline.parameters():
            parameter.grad = None
        return self.pipeline.step(self.inputs, self.targets, record=record)

    def __call__(self) -> Any:
        self.step()
        return self.proof

    def _record_times(self, recorder: Recorder) -> None:
        """Of one step, action by action."""
        schedule = self.pipeline.schedule
        mine: list[tuple[float, float]] = []

        def note(rank: int, action: Action, begin: float, end: float) -> None:
            mine.append((begin, end))

        self.step(note)
        lost_time.Stamps(_from_all(mine, schedule.world_size)).record(schedule, recorder)

    def _record_held(self, recorder: Recorder, counts_bytes: bool) -> None:
        """Activations, and the bytes of torch's storages that come and go in a step (gradients of weights
        stay, and do not count)."""
        from parallel.memory import tracked

        world_size = self.pipeline.schedule.world_size
        counts = _from_all(self.pipeline.peak_in_flight, world_size)
        for rank, count in enumerate(counts):
            recorder.record(f"rank{rank}_in_flight", float(count), "")
        recorder.record("in_flight", float(max(counts)), "")
        if counts_bytes:
            with tracked() as memory:
                self.pipeline.step(self.inputs, self.targets)
            recorder.record("held", float(max(_from_all(memory.peak_bytes, world_size))), "B")

    def close(self) -> None:
        del self.pipeline


def _from_all(mine: Any, world_size: int) -> list[Any]:
    """What each rank has."""
    import torch.distributed as dist

    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, mine)
    return found


def proof_of(losses: Any, parameters: list[Any]) -> Any:
    """One vector (float64): the losses of the micro-batches; then of every gradient some elements evenly
    spread, and its sum over sqrt(elements) and its norm, in which all have a part. A rank's answer may be
    8 MB at most, and the gradients themselves are more."""
    import torch

    found = [losses.double()]
    for parameter in parameters:
        gradient = parameter.grad.detach().double().flatten()
        step = math.ceil(len(gradient) * len(parameters) / PROOF_NUMBERS)
        whole = torch.stack([gradient.sum() / math.sqrt(len(gradient)), gradient.norm()])
        found += [gradient[::step], whole]
    return torch.cat(found)


def setup_of(group: str, name: str) -> Callable[[Any, Recorder], Step]:
    """Of the schedule ``name`` in a group: virtual devices, or a model."""

    def setup(config: Config, recorder: Recorder) -> Step:
        if group == VIRTUAL:
            schedule = config.schedule_of(name, config.ranks)
            return Run(*virtual_pipeline(config, schedule), recorder, counts_bytes=False)
        schedule = config.schedule_of(name, config.stages)
        return Run(*real_pipeline(config, group, schedule), recorder, counts_bytes=True)

    return setup
