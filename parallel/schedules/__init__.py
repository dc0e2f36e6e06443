"""Pipeline schedules as data: one short file a schedule, what validates them, and what simulates them.

    schedule = schedules.build("zb_v", world_size=4, microbatches=16)
    timeline = schedules.simulate(schedule, schedules.Durations(forward=1.0, input_gradient=1.0, weight_gradient=1.0))
    timeline.step, timeline.bubble, timeline.activations
    runnable = schedules.with_communication(schedule)

``actions`` says what a schedule is and how its text looks.
"""

from parallel.schedules.actions import Action, Kind, Schedule
from parallel.schedules.dualpipe_v import dualpipe_v
from parallel.schedules.gpipe import gpipe
from parallel.schedules.interleaved_1f1b import interleaved_1f1b
from parallel.schedules.looped_bfs import looped_bfs
from parallel.schedules.one_f_one_b import one_f_one_b
from parallel.schedules.zb_h1 import zb_h1
from parallel.schedules.zb_v import zb_v

_BUILDERS = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "looped_bfs": looped_bfs,
    "zb_h1": zb_h1,
    "zb_v": zb_v,
    "dualpipe_v": dualpipe_v,
}
NAMES = tuple(_BUILDERS)


def build(name: str, world_size: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule called ``name`` (one of NAMES), of computing actions only."""
    if stages_per_rank is None or name not in ("interleaved_1f1b", "looped_bfs"):
        return _BUILDERS[name](world_size, microbatches)
    return _BUILDERS[name](world_size, microbatches, stages_per_rank)
