"""The schedules by name: how each is built, and its closed forms."""

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
from parallel.schedules.actions import Schedule

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
_LOOPED = ("interleaved_1f1b", "looped_bfs")  # two stages a rank, or any other number
_V_SHAPED = ("zb_v", "dualpipe_v", "v_half")  # two


def usual_stages_per_rank(name: str) -> int:
    """1 or 2: how many stages a rank holds under the schedule ``name`` if nothing else is asked for."""
    if name not in _ALGORITHMS:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(NAMES)}")
    return 2 if name in _LOOPED + _V_SHAPED else 1


def allows(name: str, stages_per_rank: int) -> bool:
    """Whether a rank can hold as many stages under the schedule ``name``. Looped schedules of one stage a
    rank are 1F1B and GPipe."""
    usual = usual_stages_per_rank(name)
    return stages_per_rank == usual or (name in _LOOPED and stages_per_rank > usual)


def build(name: str, world_size: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule ``name``, one of NAMES, of computing actions only.

    stages_per_rank: of interleaved_1f1b and looped_bfs, 2 or more. ValueError: what cannot be.
    """
    arguments = _arguments(name, world_size, microbatches, stages_per_rank)
    return _ALGORITHMS[name].build(*arguments)


def bubble(name: str, world_size: int, microbatches: int, stages_per_rank: int | None = None) -> float | None:
    """Closed form of the idle share of a step when F = I = W on all stages and links are free; None where
    none is known (few micro-batches, groups that do not come out even)."""
    arguments = _arguments(name, world_size, microbatches, stages_per_rank)
    return _ALGORITHMS[name].bubble(*arguments)


def activations(
    name: str, world_size: int, microbatches: int, rank: int, stages_per_rank: int | None = None
) -> int:
    """Closed form of the most activations of a stage that ``rank`` holds at once (of v_half: a bound)."""
    world_size, microbatches, *more = _arguments(name, world_size, microbatches, stages_per_rank)
    return _ALGORITHMS[name].activations(world_size, microbatches, rank, *more)


def _arguments(name: str, world_size: int, microbatches: int, asked: int | None) -> tuple[int, ...]:
    """What the functions of a schedule's file take, checked."""
    count = usual_stages_per_rank(name) if asked is None else asked
    if not allows(name, count):
        usual = usual_stages_per_rank(name)
        most = " or more" if name in _LOOPED else ""
        raise ValueError(f"{name} has {usual}{most} stages a rank, not {count}")
    if world_size < 1:
        raise ValueError(f"a pipeline needs at least one rank, not {world_size}")
    if microbatches < 1:
        raise ValueError(f"a step needs at least one micro-batch, not {microbatches}")
    return (world_size, microbatches, count) if name in _LOOPED else (world_size, microbatches)
