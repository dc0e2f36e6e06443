"""What changed between two reports, row by row: what is different, and what that does to the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.stats import TOLERANCE
from bench.traces.diff_estimate import Estimate
from bench.traces.diff_sides import Side
from bench.traces.matching import Key, Match


@dataclass(frozen=True)
class Row:
    """One contribution to the change of the step.

    name, shape, path: the operation, the shapes of its inputs, the operators around it (outermost first).
    what: operation, communication (exposed), copy, waiting, function, idle, "host" (an operator of the host
    that takes none of the device's time), or "alike": the factor that all operations share.
    change: what is different about it besides time ("" for nothing): added, removed, more calls, fewer calls,
    other shapes, other implementation, other kernels, other place.
    verdict: slower, faster, same, undecidable.
    base_seconds, new_seconds, base_calls, new_calls: in the typical step.
    seconds: what it adds to the step beyond what is alike; low, high: its interval, None where there is none.
    share: seconds as a share of the base step.
    base_kernels, new_kernels: (name, seconds a step), longest first. other_shapes: those of the new side.
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


def ranked_rows(
    matches: Sequence[Match], found: Estimate, counts: Sequence[np.ndarray], base: Side, new: Side
) -> list[Row]:
    total = max(float(found.base.sum()), 1.0)
    rows = []
    sure = []
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
        matters = abs(excess) > _band(before, total)
        sure.append(_sureness(abs(excess), reach) if matters and known else (0.0, 0.0))
    order = sorted(range(len(rows)), key=lambda row: (sure[row], abs(rows[row].seconds)), reverse=True)
    rows = [rows[index] for index in order]
    alike = float((found.new - found.base - found.excess).sum())
    if found.alike != 1.0:
        rows.append(_alike_row(found, alike, total))
    return rows


def host_rows(base: Side, new: Side) -> list[Row]:
    """Operators of the host that take none of the device's time and are there more or less often than before.

    Where an operator is new, those inside it are not named again.
    """
    before, after = base.hosted(), new.hosted()
    timed = {
        tuple(frame.name for frame in key.path[:depth])
        for key in (*base.keys, *new.keys)
        for depth in range(1, len(key.path) + 1)
    }
    rows = []
    told: set[tuple[str, ...]] = set()
    for path in sorted({*before, *after}, key=lambda path: (len(path), path)):
        calls = before.get(path, 0.0), after.get(path, 0.0)
        change = _calls_change(calls)
        if path in timed or not change:
            continue
        if not all(calls):
            change = "removed" if calls[0] else "added"
            told.add(path)
        if path[:-1] not in told:
            place = {"name": path[-1], "shape": "", "path": path[:-1], "what": "host"}
            rows.append(_untimed(change=change, base_calls=calls[0], new_calls=calls[1], **place))
    return rows


def _sureness(excess: float, reach: float) -> tuple[float, float]:
    """What ranks a row: the part of its contribution that is certain, then how near it is to certain."""
    return max(0.0, excess - reach), excess / reach if reach else 0.0


def _untimed(**given: Any) -> Row:
    nothing = {"change": "", "verdict": "", "base_seconds": 0.0, "new_seconds": 0.0, "base_calls": 0.0}
    nothing |= {"new_calls": 0.0, "seconds": 0.0, "low": None, "high": None, "share": 0.0}
    return Row(**{**nothing, **given})


def _alike_row(found: Estimate, nanoseconds: float, total: float) -> Row:
    base = nanoseconds / (found.alike - 1)
    return _untimed(
        name=f"everything alike ({found.alike:.3f}x)",
        shape="",
        path=(),
        what="alike",
        base_seconds=base / 1e9,
        new_seconds=(base + nanoseconds) / 1e9,
        seconds=nanoseconds / 1e9,
        share=nanoseconds / total,
    )


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


def _change(
    found: Match, calls: tuple[float, float], kernels: tuple[dict[str, float], dict[str, float]]
) -> str:
    if not found.base or not found.new:
        return found.how
    if found.how in ("other shapes", "other implementation"):
        return found.how
    if changed := _calls_change(calls):
        return changed
    if found.how != "same place":
        return "other place"
    return "other kernels" if set(kernels[0]) != set(kernels[1]) else ""


def _calls_change(calls: tuple[float, float]) -> str:
    if abs(calls[1] - calls[0]) < max(0.5, 0.01 * calls[0]):
        return ""
    return "more calls" if calls[1] > calls[0] else "fewer calls"


def _verdict(before: float, excess: float, reach: float, total: float) -> str:
    band = _band(before, total)
    if abs(excess) - reach > band:
        return "slower" if excess > 0 else "faster"
    return "same" if abs(excess) + reach <= band else "undecidable"


def _band(before: float, total: float) -> float:
    """Nanoseconds of change that are called *same*: of the operation itself, and a thousandth of the step."""
    return max(TOLERANCE * before, total / 1000)


def _longest(kernels: dict[str, float], limit: int = 8) -> tuple[tuple[str, float], ...]:
    first = sorted(kernels.items(), key=lambda item: -item[1])[:limit]
    return tuple((name, nanoseconds / 1e9) for name, nanoseconds in first)
