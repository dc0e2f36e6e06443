"""When each action of a schedule happens, if actions and links take given times; what is idle and held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.schedules.actions import Kind, Schedule
from parallel.schedules.communication import without_communication
from parallel.schedules.flat import Flat, flatten, needs

Seconds = float | Sequence[float]


def per_stage(values: float | Sequence[float], stages: int, what: str) -> np.ndarray:
    """``values`` as one number a stage. ValueError: not one a stage, or a number below 0 or none."""
    row = np.asarray(values, float)
    if row.shape not in ((), (stages,)):
        raise ValueError(f"{what} of {row.size} stages do not fit a schedule of {stages} stages")
    if not (np.isfinite(row) & (row >= 0)).all():
        raise ValueError(f"{what} must be numbers of 0 or more, not {row.min():g}")
    return np.broadcast_to(row, (stages,))


@dataclass(frozen=True)
class Durations:
    """Seconds of each action: one number for all stages, or one a stage.

    backward: both halves in one; None: their sum. (Apart they take longer where they share work.)
    """

    forward: Seconds
    input_gradient: Seconds
    weight_gradient: Seconds
    backward: Seconds | None = None

    def table(self, stages: int) -> np.ndarray:
        """Seconds by (kind, stage), in the order of ``Kind``. ValueError: not one a stage, or not a time."""
        halves = [self.input_gradient, self.weight_gradient]
        rows = [per_stage(values, stages, "durations") for values in (self.forward, *halves)]
        whole = rows[1] + rows[2] if self.backward is None else per_stage(self.backward, stages, "durations")
        return np.stack([rows[0], whole, rows[1], rows[2]])


@dataclass(frozen=True)
class Link:
    """What a message between ranks costs: what ``parallel.link`` delays it, if receives are posted ahead.

    Each rank sends one message at a time, which takes ``latency + bytes * seconds_per_byte``.
    latency: s. seconds_per_byte: s/B. activation_bytes: of what goes from one stage to the next, and of its
    gradient; one number, or one a stage (of its output). handling: s of the processor, at either end.
    """

    latency: float = 0.0
    seconds_per_byte: float = 0.0
    activation_bytes: float | Sequence[float] = 0.0
    handling: float = 0.0

    def seconds(self, stages: int) -> np.ndarray:
        """Of sending the output of each stage; the last has none."""
        return self.latency + per_stage(self.activation_bytes, stages, "bytes") * self.seconds_per_byte


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happens when. Columns over all computing actions, rank after rank, each in its order.

    rank, kind, stage, microbatch: int32. duration: s that the action computes. start, end: s from the
    beginning of the step; of actions that run side by side, of both. step: s, to the last end. overhead: s
    before each action, as was given.
    """

    schedule: Schedule
    rank: np.ndarray
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    duration: np.ndarray
    start: np.ndarray
    end: np.ndarray
    step: float
    overhead: float

    @property
    def busy(self) -> np.ndarray:
        """Seconds that each rank computes."""
        return np.bincount(self.rank, self.duration, self.schedule.world_size)

    @property
    def efficiency(self) -> float:
        """Share of all ranks' time in which they compute; 0 for a step without duration."""
        return float(self.busy.mean() / self.step) if self.step > 0 else 0.0

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait, for one another or a link."""
        actions = len(self.rank) / self.schedule.world_size
        return max(0.0, 1.0 - self.efficiency - actions * self.overhead / self.step) if self.step > 0 else 0.0


def simulate(
    schedule: Schedule,
    durations: Durations,
    link: Link | None = None,
    overhead: float = 0.0,
    side_by_side: bool = False,
) -> Timeline:
    """The timeline of ``schedule``, each rank going through its actions as early as they can begin.

    Sends and receives in the schedule are left out: messages are sent when computed, received when needed.
    overhead: s that pass on a rank before each action. side_by_side: a forward and the full backward of
    another stage behind it run as one and give their results at its end (DualPipe's pairs).
    ValueError: durations that do not fit, or ranks that wait for one another for ever (``validate`` says
    more).
    """
    from parallel.schedules.event_loop import run

    link = link or Link()
    schedule = without_communication(schedule)
    flat = flatten(schedule)
    need = needs(flat)
    duration = durations.table(schedule.stages)[flat.kind, flat.stage]
    transfer = _transfers(schedule, link)[(flat.kind != Kind.FORWARD).astype(np.int32), flat.stage]
    joined = _pairs(flat) if side_by_side else np.zeros(len(need), bool)
    costs = duration, transfer, overhead, link.handling
    start, end, reached = run(flat.first, need, joined, flat.rank, *costs)
    stuck = np.flatnonzero(reached < flat.first[1:])
    if len(stuck):
        row = int(reached[stuck[0]])
        raise ValueError(
            f"{schedule.name}: {flat.where(row)} waits for ever, for {flat.where(int(need[row]))}"
        )
    columns = flat.rank, flat.kind, flat.stage, flat.microbatch, duration, start, end
    return Timeline(schedule, *columns, float(end.max(initial=0.0)), overhead)


def _pairs(flat: Flat) -> np.ndarray:
    """Whether each row is a forward with the full backward of another stage behind it on its rank."""
    pairs = np.zeros(len(flat.kind), bool)
    together = (flat.kind[:-1] == Kind.FORWARD) & (flat.kind[1:] == Kind.BACKWARD)
    pairs[:-1] = together & (flat.stage[:-1] != flat.stage[1:]) & (flat.rank[:-1] == flat.rank[1:])
    return pairs


def _transfers(schedule: Schedule, link: Link) -> np.ndarray:
    """Seconds of a message by (forward or backward, stage that sends it)."""
    seconds = link.seconds(schedule.stages)
    return np.stack([seconds, np.concatenate(([0.0], seconds[:-1]))])


def peak_activations(schedule: Schedule, size: float | Sequence[float] = 1, kept: float = 1.0) -> np.ndarray:
    """Most that each rank holds at once for later backwards, as float64.

    size: what a stage holds for one micro-batch, one number or one a stage: 1 counts them, else bytes.
    kept: share of it that a weight gradient still needs after the input gradient.
    """
    sizes = per_stage(size, schedule.stages, "sizes")
    change = np.zeros(8)
    change[[Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]] = 1, -1, kept - 1, -kept
    peaks = [np.cumsum(change[rank[:, 0]] * sizes[rank[:, 1]]).max(initial=0.0) for rank in schedule.ranks]
    return np.array(peaks)
