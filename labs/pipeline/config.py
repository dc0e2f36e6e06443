"""Sizes of the pipeline lab, and which schedules it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from labs.lab import nearest, setting

if TYPE_CHECKING:
    from parallel.schedules import Schedule

HEAD = 32  # numbers of an attention head
ALL = "all"
SCHEDULES = (
    *("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"),
    *("zb_h1", "zb_v", "dualpipe_v", "v_half"),
)
"""Those of ``parallel.schedules``, known without importing it."""
MODELS = ("gpt", "encoder_decoder")


@dataclass(frozen=True)
class Config:
    """Two models in real pipelines on the cores that there are, and a pipeline of virtual devices."""

    schedule: str = setting(ALL, unit="", help="a schedule, a file that holds one, or all")
    stages: int = setting(
        2,
        unit="stages",
        help="ranks of the real pipelines, a stage each; some schedules cut each in two",
        minimum=2,
        maximum=64,
    )
    microbatches: int = setting(8, unit="micro-batches", help="of a step", minimum=1, maximum=1024)
    ranks: int = setting(
        4, unit="devices", help="virtual devices of the other pipeline, a process each", minimum=2, maximum=64
    )
    unit_ms: float = setting(
        20.0,
        quick=5.0,
        full=25.0,
        unit="ms",
        help="forward of a virtual device; its input and weight gradients take as long",
        minimum=0.1,
        maximum=10_000.0,
    )
    width: int = setting(
        256, quick=128, full=384, unit="numbers", help="width of the models; a multiple of 32", minimum=HEAD
    )
    layers: int = setting(8, unit="blocks", help="blocks of a model", minimum=2, maximum=256)
    length: int = setting(64, unit="tokens", help="tokens of a sequence", minimum=1, maximum=4096)
    sequences: int = setting(4, quick=2, unit="sequences", help="sequences of a micro-batch", minimum=1)

    def __post_init__(self) -> None:
        if self.width % HEAD:
            raise ValueError(f"pipeline: width={self.width} is no multiple of {HEAD}, the size of a head")
        if self.layers < 2 * self.stages:
            raise ValueError(
                f"pipeline: layers={self.layers} are fewer than the {2 * self.stages} stages that schedules "
                f"with two stages on each of {self.stages} ranks need"
            )
        if self.is_file and (size := self.from_file().world_size) not in (self.stages, self.ranks):
            raise ValueError(
                f"pipeline: the schedule in {self.schedule} is for {size} ranks; there are {self.stages} "
                f"(stages) and {self.ranks} virtual ones (ranks)"
            )

    @property
    def is_file(self) -> bool:
        return self.schedule not in (ALL, *SCHEDULES)

    def from_file(self) -> Schedule:
        """The schedule in the file ``schedule``; ValueError: there is no such file, or it is wrong."""
        if not Path(self.schedule).is_file():
            words = (ALL, *SCHEDULES)
            raise ValueError(
                f"pipeline: schedule={self.schedule!r} is no schedule and no file"
                f"{nearest(self.schedule, words)}"
            )
        return _loaded(self.schedule)

    def names(self, world_size: int) -> tuple[str, ...]:
        """The schedules to run on so many ranks; a file's is called as the schedule in it."""
        if self.is_file:
            found = self.from_file()
            return (found.name,) if found.world_size == world_size else ()
        return SCHEDULES if self.schedule == ALL else (self.schedule,)

    def schedule_of(self, name: str, world_size: int) -> Schedule:
        """The schedule called ``name``."""
        from parallel import schedules

        if self.is_file:
            return self.from_file()
        return schedules.build(name, world_size, self.microbatches)


@cache
def _loaded(path: str) -> Schedule:
    from parallel import schedules

    return schedules.load(path)
