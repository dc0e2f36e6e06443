"""Two profiler reports side by side: what changed, and what each change does to the step.

    difference(load("before.json.gz"), load("after.json.gz")).sentence

Each side is a file or a folder of ranks; ranks are matched by number, and what an operation takes is the mean over
them. A folder of recordings made one after another by one process counts as one recording. Every row of the
result is something that takes time in the step (an operation, exposed communication, idle time, ...), matched
by ``matching``, timed by ``diff_attribution`` and judged by ``diff_estimate``. Rows sum to the change of the step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.stats import TOLERANCE, Comparison
from bench.traces.diff_estimate import Estimate, Sample, estimate
from bench.traces.diff_sides import Side, side
from bench.traces.events import Job
from bench.traces.matching import Key, Match, match

SCALED = ("operation", "function", "waiting")
"""What the speed of the machine multiplies. Idle time of a host (Python between operations) is scaled too."""


@dataclass(frozen=True)
class Row:
    """One contribution to the change of the step.

    name, shape, path: the operation, the shapes of its inputs, the operators around it (outermost first).
    what: operation, communication (exposed), copy, waiting, function, idle, or "alike": the factor that all
    operations share. change: what is different about it besides time ("" for nothing): added, removed, more
    calls, fewer calls, other shapes, other implementation, other kernels, other place. verdict: slower, faster,
    same, undecidable. base_seconds, new_seconds, base_calls, new_calls: in the typical step. seconds: what it
    adds to the step beyond what is alike; low, high: its interval, None where there is none. share: seconds as
    a share of the base step. base_kernels, new_kernels: (name, seconds a step), longest first.
    """

    name: str
    shape: str
    path: tuple[str, ...]
    what: str
    change: str
    verdict: str
    base_seconds: float
    new_seconds: float
    base_calls: float
    new_calls: float
    seconds: float
    low: float | None
    high: float | None
    share: float
    base_kernels: tuple[tuple[str, float], ...] = ()
    new_kernels: tuple[tuple[str, float], ...] = ()
    other_shapes: str = ""


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
    rows = _rows(matches, found, counts, before, after)
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
            f"no rank is in both: {base.source} has {_numbers(base.ranks)}, {new.source} has {_numbers(new.ranks)}"
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


def _rows(
    matches: Sequence[Match], found: Estimate, counts: Sequence[np.ndarray], base: Side, new: Side
) -> list[Row]:
    total = max(float(found.base.sum()), 1.0)
    rows = []
    certain = []
    for index, pair in enumerate(matches):
        before, after = float(found.base[index]), float(found.new[index])
        if before == 0 and after == 0:
            continue
        excess, reach = float(found.excess[index]), float(found.reach[index])
        kernels = base.kernels_of(pair.base), new.kernels_of(pair.new)
        calls = float(counts[0][index]), float(counts[1][index])
        name, shape, path = _place(pair)
        known = math.isfinite(reach)
        rows.append(
            Row(
                name,
                shape,
                path,
                (pair.base or pair.new)[0].what,
                _change(pair, calls, kernels),
                _verdict(before * (found.alike if before else 1.0), excess, reach, total),
                before / 1e9,
                after / 1e9,
                *calls,
                excess / 1e9,
                (excess - reach) / 1e9 if known else None,
                (excess + reach) / 1e9 if known else None,
                excess / total,
                _longest(kernels[0]),
                _longest(kernels[1]),
                _shapes(pair.new) if pair.how.endswith("shapes") else "",
            )
        )
        certain.append(max(0.0, abs(excess) - reach) if known else 0.0)
    order = sorted(range(len(rows)), key=lambda index: (-certain[index], -abs(rows[index].seconds)))
    rows = [rows[index] for index in order]
    alike = float((found.new - found.base - found.excess).sum())
    if found.alike != 1.0:
        rows.append(_alike_row(found, alike, total))
    return rows


def _alike_row(found: Estimate, nanoseconds: float, total: float) -> Row:
    base = nanoseconds / (found.alike - 1)
    return Row(
        f"everything alike ({found.alike:.3f}x)", "", (), "alike", "", "", base / 1e9, (base + nanoseconds) / 1e9,
        0.0, 0.0, nanoseconds / 1e9, None, None, nanoseconds / total,
    )  # fmt: skip


def _place(found: Match) -> tuple[str, str, tuple[str, ...]]:
    """(name, shapes, operators around it) of what a match stands for."""
    keys = (*found.base, *found.new)
    if found.how != "other implementation":
        frame = keys[0].path[-1]
        return frame.name, _shapes(found.base or found.new), tuple(f.name for f in keys[0].path[:-1])
    shared = []
    for frames in zip(*(key.path for key in keys), strict=False):
        if len({frame.name for frame in frames}) > 1:
            break
        shared.append(frames)
    shapes = {frame.shape for frame in shared[-1]}
    path = tuple(frames[0].name for frames in shared)
    return path[-1], shapes.pop() if len(shapes) == 1 else "", path[:-1]


def _shapes(keys: Sequence[Key]) -> str:
    shapes = list(dict.fromkeys(key.path[-1].shape for key in keys))
    return shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"


def _change(found: Match, calls: tuple[float, float], kernels: tuple[Counter[str], Counter[str]]) -> str:
    if not found.base or not found.new:
        return found.how
    if found.how in ("other shapes", "other implementation"):
        return found.how
    if abs(calls[1] - calls[0]) >= max(0.5, 0.01 * calls[0]):
        return "more calls" if calls[1] > calls[0] else "fewer calls"
    if found.how != "same place":
        return "other place"
    return "other kernels" if set(kernels[0]) != set(kernels[1]) else ""


def _verdict(before: float, excess: float, reach: float, total: float) -> str:
    """Of one row: against itself, and of no weight below a thousandth of the step."""
    band = max(TOLERANCE * before, total / 1000)
    if abs(excess) - reach > band:
        return "slower" if excess > 0 else "faster"
    return "same" if abs(excess) + reach <= band else "undecidable"


def _longest(kernels: Counter[str], limit: int = 8) -> tuple[tuple[str, float], ...]:
    return tuple((name, nanoseconds / 1e9) for name, nanoseconds in kernels.most_common(limit))


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
