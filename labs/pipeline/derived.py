"""What follows from several variants: whether stages measured alone tell the step of a pipeline of them."""

from __future__ import annotations

from collections.abc import Sequence

from labs.lab import Interval, Measurement, Results
from labs.pipeline import simulated, stage_times
from labs.pipeline.config import MODELS


def from_stage_times(results: Results, model: str, name: str) -> float | None:
    """Seconds of a step of the schedule ``name``, simulated from stage times that were measured alone."""
    config = results.config
    schedule = config.schedule_of(name, config.stages)
    durations = stage_times.measured(results, model, schedule.stages)
    if durations is None:
        return None
    size = simulated.state_bytes(config, model)
    return simulated.step_seconds(results.machine, schedule, durations, size)


def step_ratio(results: Results, model: str, name: str) -> Interval | None:
    """Seconds measured over those simulated."""
    address = f"{model}/{name}"
    said = from_stage_times(results, model, name) if results.has(address) else None
    if said is None:
        return None
    time = results.seconds(address)
    return Interval(time.value / said, time.low / said, time.high / said)


def derive(results: Results) -> Sequence[Measurement]:
    """The ratio of each schedule on each model."""
    found = []
    for model in MODELS:
        for name in results.config.names(results.config.stages):
            ratio = step_ratio(results, model, name)
            if ratio is not None:
                found.append(Measurement(f"{model}_{name}_ratio", ratio))
    return found
