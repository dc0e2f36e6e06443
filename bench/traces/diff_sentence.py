"""What happened between two reports, in one sentence that only says what is known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.report.units import format_seconds
from bench.stats import MIN_SAMPLES_UNPAIRED
from bench.traces.diff_estimate import Estimate
from bench.traces.diff_sides import Side
from bench.traces.diff_steps import LAUNCHING, NOTHING_RECORDED

if TYPE_CHECKING:
    from bench.traces.diff import Row

_NAMED = 3  # contributions that a sentence can hold
_WORTH_SAYING = 0.1  # of the change


def sentence(rows: Sequence[Row], found: Estimate, base: Side, new: Side) -> str:
    before, after = float(found.base.sum()) / 1e9, float(found.new.sum()) / 1e9
    change = after - before
    few = min(len(base.start), len(new.start)) < MIN_SAMPLES_UNPAIRED
    percent = f"{abs(change) / before * 100:.1f} %" if before else "all"
    step = "step" if base.given and new.given else "recording"
    reasons = contributions(rows, change)
    verdict = found.step.verdict
    if verdict == "same":
        changed = [row for row in rows if row.what != "alike" and row.verdict in ("slower", "faster")]
        text = f"same: the {step} takes {format_seconds(before)} and {format_seconds(after)}"
        return (
            f"{text}, and no operation differs"
            if not changed
            else f"{text}, though {contributions(changed, 0.0)}"
        )
    if verdict in ("slower", "faster"):
        return f"the {step} is {percent} {verdict} ({signed(change)} of {format_seconds(before)}): {reasons}"
    took = f"the {step} took {format_seconds(before)} and now {format_seconds(after)} ({signed(change)}, {percent})"
    if few:
        count = min(len(base.start), len(new.start))
        chance = f"{count} step{'' if count == 1 else 's'} cannot tell whether by chance"
        return f"{took}; {chance}: {reasons}"
    low, high = (found.step.low - 1) * 100, (found.step.high - 1) * 100
    reach = f"from {low:+.1f} % to {high:+.1f} %" if math.isfinite(high) else "unknown"
    if found.alike != 1.0 and not _decided(rows):
        return (
            f"cannot tell: {took}, but everything changed alike ({found.alike:.2f}x), as a busier or slower machine "
            "does it, and no operation stands out"
        )
    return f"cannot tell: {took}, but the change may be anything {reach}; {reasons}"


def _decided(rows: Sequence[Row]) -> bool:
    return any(row.verdict in ("slower", "faster") for row in rows)


def contributions(rows: Sequence[Row], change: float) -> str:
    """The largest contributions in words; those that go the way of the change (seconds) first."""
    alike = next((row for row in rows if row.what == "alike"), None)
    named = [row for row in rows if row.what != "alike" and row.seconds]
    named = [row for row in named if abs(row.seconds) >= _WORTH_SAYING * abs(change)][: 2 * _NAMED]
    along = [row for row in named if row.seconds * change >= 0][:_NAMED]
    against = [row for row in named if row.seconds * change < 0][: _NAMED - 1 if along else _NAMED]
    said = ", ".join(in_words(row) for row in along)
    if against:
        said += f"{', while ' if said else ''}{', '.join(in_words(row) for row in against)}"
    if alike is not None and abs(alike.seconds) >= _WORTH_SAYING * abs(change):
        said += f"{'; ' if said else ''}everything alike takes {alike.new_seconds / alike.base_seconds:.2f}x as long"
    return said or "many small changes, none of a tenth of it"


def in_words(row: Row) -> str:
    """``aten::mm [64,1024]x[1024,1024] takes 2.1 ms more``."""
    name = label(row)
    amount = format_seconds(abs(row.seconds))
    more = "more" if row.seconds > 0 else "less"
    if row.change in ("added", "removed"):
        return f"{name} was {row.change} ({signed(row.seconds)})"
    if row.change in ("more calls", "fewer calls"):
        calls = f"{row.base_calls:.4g} to {row.new_calls:.4g} calls"
        return f"{name} takes {amount} {more} ({calls})"
    if row.change == "other shapes":
        return f"{name} takes {amount} {more} (now {shapes(row.other_shapes)})"
    if row.change:
        return f"{name} takes {amount} {more} ({row.change})"
    return f"{name} takes {amount} {more}"


def label(row: Row) -> str:
    """What a row is, with its shapes."""
    name = f"{row.name} {shapes(row.shape)}".strip()
    if row.what == "idle":
        if row.name == LAUNCHING:
            return "idle time of the device, while the host launches,"
        if row.name == NOTHING_RECORDED:
            return "time between operations"
        return f"idle time in {name}"
    if row.what == "communication":
        return f"exposed communication in {name}"
    if row.what == "waiting":
        return f"waiting in {name}"
    return name


def signed(seconds: float) -> str:
    """``+3.1 ms``."""
    return f"{'+' if seconds >= 0 else '-'}{format_seconds(abs(seconds))}"


def shapes(text: str) -> str:
    """``[[64, 1024], [1024, 1024], []]`` as ``[64,1024]x[1024,1024]``; other text as it is."""
    found = re.findall(r"\[([\d, ]+)\]", text)
    return (
        "x".join(f"[{part.replace(' ', '')}]" for part in found)
        if found
        else text
        if "shapes" in text
        else ""
    )
