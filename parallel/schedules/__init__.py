"""Pipeline schedules as data: one short file a schedule, what validates them, and what simulates them.

    schedule = schedules.build("zb_v", world_size=4, microbatches=16)
    timeline = schedules.simulate(schedule, schedules.Durations(1.0, 1.0, 1.0))
    timeline.step, timeline.bubble, schedules.peak_activations(schedule)
    runnable = schedules.with_communication(schedule)

``actions`` says what a schedule is and how its text looks; every schedule's file, where it comes from.
"""

from __future__ import annotations

from types import ModuleType

from parallel.schedules import (
    dualpipe_v,
    gpipe,
    interleaved_1f1b,
    looped_bfs,
    one_f_one_b,
    v_half,
    zb_h1,
    zb_v,
)
from parallel.schedules.actions import COMPUTING, Action, Kind, Schedule, columns
from parallel.schedules.communication import with_communication, without_communication
from parallel.schedules.simulator import Durations, Link, Timeline, peak_activations, simulate
from parallel.schedules.text import load, parse, parse_csv, to_text
from parallel.schedules.validator import validate

__all__ = [
    "COMPUTING",
    "NAMES",
    "Action",
    "Durations",
    "Kind",
    "Link",
    "Schedule",
    "Timeline",
    "activations",
    "bubble",
    "build",
    "columns",
    "load",
    "parse",
    "parse_csv",
    "peak_activations",
    "simulate",
    "stages_per_rank",
    "to_text",
    "validate",
    "with_communication",
    "without_communication",
]

_ALGORITHMS: dict[str, ModuleType] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "looped_bfs": looped_bfs,
    "zb_h1": zb_h1,
    "zb_v": zb_v,
    "dualpipe_v": dualpipe_v,
    "v_half": v_half,
}
NAMES = tuple(_ALGORITHMS)
"""What ``build`` knows."""
_LOOPED = ("interleaved_1f1b", "looped_bfs")  # any number of stages a rank
_V_SHAPED = ("zb_v", "dualpipe_v", "v_half")  # two


def stages_per_rank(name: str, asked: int | None = None) -> int:
    """How many stages a rank holds under the schedule ``name``: ``asked``, if it can; by default 1 or 2.

    ValueError: no such schedule, or it cannot have as many.
    """
    if name not in _ALGORITHMS:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(NAMES)}")
    usual = 2 if name in _LOOPED + _V_SHAPED else 1
    if asked is None or asked == usual:
        return usual
    if name in _LOOPED and asked >= 1:
        return asked
    raise ValueError(f"{name} has {usual} {'stage' if usual == 1 else 'stages'} a rank, not {asked}")


def build(name: str, world_size: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule ``name``, one of NAMES, of computing actions only.

    stages_per_rank: of interleaved_1f1b and looped_bfs, 2 by default. ValueError: what cannot be.
    """
    return _ALGORITHMS[name].build(*_arguments(name, world_size, microbatches, stages_per_rank))


def bubble(name: str, world_size: int, microbatches: int, stages_per_rank: int | None = None) -> float | None:
    """Closed form of the idle share of a step when F = I = W on all stages and links are free; None where
    none is known (few micro-batches, groups that do not come out even)."""
    return _ALGORITHMS[name].bubble(*_arguments(name, world_size, microbatches, stages_per_rank))


def activations(
    name: str, world_size: int, microbatches: int, rank: int, stages_per_rank: int | None = None
) -> int:
    """Closed form of the most activations of a stage that ``rank`` holds at once (of v_half: a bound)."""
    world_size, microbatches, *more = _arguments(name, world_size, microbatches, stages_per_rank)
    return _ALGORITHMS[name].activations(world_size, microbatches, rank, *more)


def _arguments(name: str, world_size: int, microbatches: int, asked: int | None) -> tuple[int, ...]:
    """What the functions of a schedule's file take, checked."""
    count = stages_per_rank(name, asked)
    if world_size < 1:
        raise ValueError(f"a pipeline needs at least one rank, not {world_size}")
    if microbatches < 1:
        raise ValueError(f"a step needs at least one micro-batch, not {microbatches}")
    return (world_size, microbatches, count) if name in _LOOPED else (world_size, microbatches)
