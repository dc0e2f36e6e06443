"""Two profiler reports side by side: what changed, and what each change does to the step.

    difference(load("before.json.gz"), load("after.json.gz")).sentence

Each side is a file or a folder of ranks; ranks are matched by number, and what an operation takes is the mean
over them. A folder of recordings made one after another by one process counts as one recording. Every row of
the result is something that takes time in the step (an operation, exposed communication, idle time, ...),
matched by ``matching``, timed by ``diff_attribution`` and judged by ``diff_estimate``. Rows sum to the change
of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.stats import Comparison
from bench.traces.diff_estimate import Estimate, Sample, estimate
from bench.traces.diff_rows import Row, host_rows, ranked_rows
from bench.traces.diff_sides import Side, side
from bench.traces.events import Job
from bench.traces.matching import Key, Match, match

SCALED = ("operation", "function", "waiting")
"""What the speed of the machine multiplies. Idle time of a host (Python between operations) is scaled too."""


@dataclass(frozen=True)
class RankChange:
    """rank: -1 where the reports do not say. base_seconds, new_seconds: the median step of this rank."""

    rank: int
    base_seconds: float
    new_seconds: float


@dataclass(frozen=True)
class Difference:
    """step: new/base of the typical step and the verdict on the whole. rows: what is certain to matter most
    first. alike: the factor that all operations share. base_steps, new_steps: how many were compared.
    in_turns: pairs of neighbouring stretches, 0 for recordings made one after the other."""

    base: str
    new: str
    sentence: str
    step: Comparison
    base_seconds: float
    new_seconds: float
    base_steps: int
    new_steps: int
    steps_given: bool
    on_device: bool
    alike: float
    in_turns: int
    rows: list[Row]
    ranks: list[RankChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The change of the typical step: what the rows sum to."""
        return self.new_seconds - self.base_seconds


def difference(base: Job, new: Job) -> Difference:
    """Compare two jobs. ValueError where a side has no events, or the two have no rank in common."""
    from bench.traces.diff_sentence import sentence

    before, after, notes = _same_ranks(side(base), side(new))
    matches = match(before.keys, after.keys)
    values = [
        _gathered(part, [getattr(m, name) for m in matches])
        for part, name in ((before, "base"), (after, "new"))
    ]
    counts = [
        _gathered_calls(part, [getattr(m, name) for m in matches])
        for part, name in ((before, "base"), (after, "new"))
    ]
    same_machine = before.device == after.device and before.on_device == after.on_device
    scales = np.array([_scales(m, before.on_device) for m in matches], bool)
    witnesses = np.array([m.how == "same place" and same_machine for m in matches], bool)
    witnesses &= np.isclose(counts[0], counts[1], rtol=0.01, atol=0.01)
    found = estimate(
        Sample(values[0], before.start, before.absolute),
        Sample(values[1], after.start, after.absolute),
        scales=scales,
        witnesses=witnesses,
    )
    rows = ranked_rows(matches, found, counts, before, after) + host_rows(before, after)
    return Difference(
        base=base.source,
        new=new.source,
        sentence=sentence(rows, found, before, after),
        step=found.step,
        base_seconds=float(found.base.sum()) / 1e9,
        new_seconds=float(found.new.sum()) / 1e9,
        base_steps=len(before.start),
        new_steps=len(after.start),
        steps_given=before.given and after.given,
        on_device=before.on_device or after.on_device,
        alike=found.alike,
        in_turns=found.pairs,
        rows=rows,
        ranks=_rank_changes(before, after),
        notes=notes + _notes(before, after, found),
    )


def _same_ranks(base: Side, new: Side) -> tuple[Side, Side, list[str]]:
    """Both sides with the ranks that both have."""
    if len(base.ranks) == len(new.ranks) == 1:
        return base, new, []
    shared = sorted(set(base.ranks) & set(new.ranks))
    if not shared:
        raise ValueError(
            f"no rank is in both: {base.source} has {_numbers(base.ranks)}, "
            f"{new.source} has {_numbers(new.ranks)}"
        )
    notes = [
        f"left out: rank {_numbers(alone)} of {part.source}, which the other side lacks"
        for part in (base, new)
        if (alone := [rank for rank in part.ranks if rank not in shared])
    ]
    return base.of_ranks(shared), new.of_ranks(shared), notes


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join("unknown" if rank < 0 else str(rank) for rank in ranks)


def _gathered(part: Side, groups: Sequence[tuple[Key, ...]]) -> np.ndarray:
    """(steps, matches): nanoseconds."""
    return _sums(part.nanoseconds, part.keys, groups)


def _gathered_calls(part: Side, groups: Sequence[tuple[Key, ...]]) -> np.ndarray:
    """(matches,): calls of a typical step."""
    calls = _sums(part.calls, part.keys, groups)
    middle, mean = np.median(calls, axis=0), calls.mean(axis=0)
    return np.where((calls > 0).mean(axis=0) > 0.5, middle, mean)


def _sums(table: np.ndarray, keys: Sequence[Key], groups: Sequence[tuple[Key, ...]]) -> np.ndarray:
    column = {key: index for index, group in enumerate(groups) for key in group}
    gathered = np.zeros((len(table), len(groups)))
    np.add.at(gathered.T, np.array([column[key] for key in keys], np.int64), table.T)
    return gathered


def _scales(found: Match, on_device: bool) -> bool:
    what = (found.base or found.new)[0].what
    return what in SCALED or (what == "idle" and not on_device)


def _rank_changes(base: Side, new: Side) -> list[RankChange]:
    numbers = [(rank, rank) for rank in base.ranks if rank in new.ranks] or [(base.ranks[0], new.ranks[0])]
    return [RankChange(mine, base.step_seconds[mine], new.step_seconds[theirs]) for mine, theirs in numbers]


def _notes(base: Side, new: Side, found: Estimate) -> list[str]:
    notes = [f"{part.source}: {note}" for part in (base, new) for note in part.notes]
    if base.device != new.device and base.device and new.device:
        notes.append(f"different devices: {base.device} and {new.device}")
    if base.on_device != new.on_device:
        notes.append("one side ran on a device, the other on the host alone")
    for part, typical in ((base, found.base), (new, found.new)):
        mean = float(part.nanoseconds.sum(axis=1).mean())
        if mean > 1.1 * typical.sum() > 0:
            share = mean / float(typical.sum()) - 1
            notes.append(
                f"{part.source}: steps vary, their mean is {share * 100:.0f} % above the typical step"
            )
    if base.formats != new.formats:
        notes.append(f"different kinds of reports: {base.formats} and {new.formats}")
    return notes
