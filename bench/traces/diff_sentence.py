"""What happened between two reports, in one sentence that only says what is known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.report.units import format_seconds, text_of
from bench.stats import MIN_SAMPLES_UNPAIRED
from bench.traces.diff_estimate import Estimate
from bench.traces.diff_sides import Side
from bench.traces.diff_steps import LAUNCHED_BEFORE, LAUNCHING, NOTHING_RECORDED

if TYPE_CHECKING:
    from bench.traces.diff_rows import Row

_NAMED = 3  # contributions that a sentence can hold
_WORTH_SAYING = 0.1  # of the change
_SHORT = 60  # letters of a name
_DECIDED = ("slower", "faster")


def sentence(rows: Sequence[Row], found: Estimate, base: Side, new: Side) -> str:
    """One sentence; what was measured with too few steps, or not sharply enough, is said to be so."""
    before, after = float(found.base.sum()) / 1e9, float(found.new.sum()) / 1e9
    change = after - before
    percent = f"{abs(change) / before * 100:.1f} %" if before else "from nothing"
    step = "step" if base.given and new.given else "recording"
    verdict = found.step.verdict
    if verdict == "same":
        return f"same: the {step} takes {format_seconds(before)} and {format_seconds(after)}{_though(rows)}"
    if verdict in _DECIDED:
        reasons = contributions(rows, change)
        return f"the {step} is {percent} {verdict} ({signed(change)} of {format_seconds(before)}): {reasons}"
    took = f"the {step} took {format_seconds(before)} and now {format_seconds(after)}"
    took += f" ({signed(change)}, {percent})"
    count = min(len(base.start), len(new.start))
    if count < MIN_SAMPLES_UNPAIRED:
        chance = f"{count} {step}{'' if count == 1 else 's'} cannot tell whether by chance"
        return f"{took}; {chance}: {contributions(rows, change)}"
    if found.alike != 1.0 and not any(row.verdict in _DECIDED for row in rows):
        return (
            f"cannot tell: {took}, but everything changed alike ({found.alike:.2f}x), as a busier or slower "
            "machine does it, and no operation stands out"
        )
    low, high = (found.step.low - 1) * 100, (found.step.high - 1) * 100
    reach = f"from {low:+.1f} % to {high:+.1f} %" if math.isfinite(high) else "at all"
    return f"cannot tell: {took}, but the change may be anything {reach}; {contributions(rows, change)}"


def _though(rows: Sequence[Row]) -> str:
    changed = [row for row in rows if row.what not in ("alike", "host") and row.verdict in _DECIDED]
    if changed:
        return f", though {contributions(changed, 0.0)}"
    host = [row for row in rows if row.what == "host"]
    if host:
        return f", though on the host {', '.join(in_words(row) for row in host[:_NAMED])}"
    return ", and no operation differs"


def contributions(rows: Sequence[Row], change: float) -> str:
    """The largest contributions in words; those that go the way of the change (in seconds) first.

    An operation that changed in many places, by little in each, is named once with its sum.
    """
    alike = next((row for row in rows if row.what == "alike"), None)
    timed = [row for row in rows if row.what not in ("alike", "host") and row.seconds]
    named = [item for item in _items(timed) if abs(item[0]) >= _WORTH_SAYING * abs(change)]
    along = [text for seconds, text in named if seconds * change >= 0][:_NAMED]
    against = [text for seconds, text in named if seconds * change < 0][: _NAMED - 1 if along else _NAMED]
    said = ", ".join(along)
    if against:
        said += f"{', while ' if said else ''}{', '.join(against)}"
    if alike is not None and abs(alike.seconds) >= _WORTH_SAYING * abs(change):
        factor = alike.new_seconds / alike.base_seconds
        said += f"{'; ' if said else ''}everything alike takes {factor:.2f}x as long"
    return said or "many small changes, none of a tenth of it"


def _items(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """(seconds, words) of what a sentence may name, what adds or saves most first; certain changes if any."""
    certain = [row for row in rows if row.verdict in _DECIDED]
    families: dict[tuple[str, str], list[Row]] = {}
    for row in certain or rows:
        families.setdefault((row.what, row.name), []).append(row)
    items = []
    for family in families.values():
        total = sum(row.seconds for row in family)
        largest = max(family, key=lambda row: abs(row.seconds))
        if len(family) == 1 or abs(largest.seconds) >= 0.6 * sum(abs(row.seconds) for row in family):
            items.append((largest.seconds, in_words(largest)))
        else:
            name = label(largest, with_shape=False)
            items.append((total, f"{name} in {len(family)} places {_takes(total)}"))
    return sorted(items, key=lambda item: -abs(item[0]))


def in_words(row: Row) -> str:
    """``aten::mm [64,1024]x[1024,1024] takes 2.1 ms more``."""
    name = label(row)
    if row.change in ("added", "removed"):
        amount = "" if row.what == "host" else f" ({signed(row.seconds)})"
        return f"{name} was {row.change}{amount}"
    why = row.change
    if row.change in ("more calls", "fewer calls"):
        why = f"{row.base_calls:.4g} to {row.new_calls:.4g} calls"
        if row.what == "host":
            return f"{name} has {why}"
    elif row.change == "other shapes" and shapes(row.other_shapes):
        why = f"now {shapes(row.other_shapes)}"
    return f"{name} {_takes(row.seconds)}{f' ({why})' if why else ''}"


def _takes(seconds: float) -> str:
    return f"takes {format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'}"


def label(row: Row, with_shape: bool = True) -> str:
    """What a row is, printable, with its shapes."""
    name = f"{short_name(row.name)} {text_of(shapes(row.shape), _SHORT) if with_shape else ''}".strip()
    if row.name == LAUNCHED_BEFORE:
        return f"what was {LAUNCHED_BEFORE}"
    if row.what == "idle":
        special = {LAUNCHING: "idle time of the device between launches", NOTHING_RECORDED: "unrecorded time"}
        return special.get(row.name, f"idle time in {name}")
    prefix = {"communication": "exposed communication in ", "waiting": "waiting in "}
    return prefix.get(row.what, "") + name


def short_name(name: str) -> str:
    """A stranger's name, printable; of a C++ kernel neither its arguments nor what it is a template of."""
    name = text_of(name[: 20 * _SHORT]).removeprefix("void ")
    while len(name) > _SHORT and (shorter := re.sub(r"<[^<>]*>|\([^()]*\)$", "", name)) != name:
        name = shorter
    return text_of(name, _SHORT)


def signed(seconds: float) -> str:
    """``+3.1 ms``."""
    return f"{'-' if seconds < 0 else '+'}{format_seconds(abs(seconds))}"


def shapes(text: str) -> str:
    """``[[64, 1024], [1024, 1024], []]`` as ``[64,1024]x[1024,1024]``; "3 shapes" as it is; else nothing."""
    found = re.findall(r"\[([\d, ]+)\]", text)
    if not found:
        return text if re.fullmatch(r"\d+ shapes", text) else ""
    return "x".join(f"[{part.replace(' ', '')}]" for part in found)
