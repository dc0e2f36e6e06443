"""What the ranks of a job say together, in words: a sentence, lines and tables; and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.report.units import format_quantity, format_ratio, text_of
from bench.traces.clocks import RankClock
from bench.traces.ranks import Lateness, Ranks
from bench.traces.ranks_late import TOLERANCE, Excess
from bench.traces.tables import Columns, seconds

LONGEST_NAME = 60
HANDED = 0.05  # of a round; what a rank loses between its threads is said from there on


def operation_text(excess: Excess | None) -> str:
    """An operation by name, or what it means that there is none."""
    if excess is None:
        return "no single operation"
    if excess.name:
        return _short(excess.name) + (" (device)" if excess.place == "device" else "")
    return "nothing recorded" + (f", after {_short(excess.after)}" if excess.after else "")


def _short(name: str) -> str:
    """Kernels of templates have names of a page; the JSON has them whole."""
    return text_of(name, LONGEST_NAME)


def sentence(ranks: Ranks) -> str:
    """Who was late, by how much and in what; or that nobody was, or why it cannot be said."""
    if not ranks.lateness or ranks.rounds is None:
        return "; ".join(ranks.notes) or "nothing to compare"
    late = ranks.late
    if late:
        return "; ".join(_late_sentence(one, ranks.rounds.unit) for one in late)
    known = [one for one in ranks.lateness if one.cost is not None]
    if not known:
        return f"cannot tell whether a rank is late: {ranks.rounds.said}"
    worst = max(known, key=lambda one: one.excess_ns)
    assert worst.cost is not None
    if worst.cost.verdict == "undecidable" and worst.cost.ratio > 1 + TOLERANCE:
        return (
            f"no rank is late for certain: rank {worst.rank} may be ({_cost(worst)} in "
            f"{ranks.rounds.said}), last to arrive in {worst.last} of {_count(ranks)} collectives"
        )
    slowest = f"rank {worst.rank}, the slowest between collectives"
    return f"no rank is late: a {ranks.rounds.unit} takes {_cost(worst)} what it would without {slowest}"


def _late_sentence(one: Lateness, unit: str) -> str:
    operation = one.operation
    text = (
        f"rank {one.rank} is late: a {unit} takes {_cost(one)} what it would take without, "
        f"{seconds(one.excess_ns)} more than the others; "
    )
    if operation is None:
        return text + "no single operation, it is slower in many"
    share = f"{seconds(operation.nanoseconds)} a {unit}"
    return text + f"most of it in {operation_text(operation)} ({share} more than the others)"


def _cost(one: Lateness) -> str:
    cost = one.cost
    if cost is None:
        return "-"
    return f"{format_ratio(cost.ratio)} [{cost.low:.2f}, {cost.high:.2f}]"


def _count(ranks: Ranks) -> int:
    return 0 if ranks.matched is None else len(ranks.matched)


def clock_text(clock: RankClock) -> str:
    """How a rank's clock was brought in line, and how exactly."""
    if clock.how == "aligned":
        text = f"{'+' if clock.offset >= 0 else '-'}{seconds(abs(clock.offset))} ± {seconds(clock.exact)}"
        if clock.drift:
            text += f", drifts {clock.drift * 1e6:+.2f} us a s"
        return f"{text} by {clock.collectives} collectives"
    if clock.how == "agrees":
        return f"agrees within {seconds(clock.exact)} in {clock.collectives} collectives"
    return {"one host": "of the same host", "unknown": "unknown"}.get(clock.how, clock.how)


def tables(ranks: Ranks) -> list[Columns]:
    """Ranks, and collectives."""
    found = []
    if ranks.lateness:
        unit = ranks.rounds.unit if ranks.rounds is not None else "round"
        rows = [
            [
                str(one.rank),
                "late" if one.late else "",
                _cost(one),
                seconds(one.waited_ns),
                seconds(one.excess_ns),
                f"{one.last} of {_count(ranks)}",
                operation_text(one.operations[0]) if one.operations and one.excess_ns > 0 else "",
                clock_text(clock),
            ]
            for one, clock in zip(ranks.lateness, ranks.clocks, strict=True)
        ]
        headers = [
            ("rank", True),
            ("", False),
            (f"{unit} over without its lateness", True),
            (f"waits a {unit}", True),
            ("more own time than the others", True),
            ("last to arrive", True),
            ("mostly in", False),
            ("clock", False),
        ]
        found.append(Columns("Ranks", headers, rows))
    if ranks.collectives:
        rows = [
            [
                _short(one.operation + (f" {one.group}" if one.group else "")),
                format_quantity(one.bytes, "B") if one.bytes >= 0 else "-",
                str(one.ranks),
                str(one.calls),
                seconds(one.skew_ns),
                seconds(one.transfer_ns) if one.transfer_ns >= 0 else "-",
                "-" if one.bus_bandwidth is None else format_quantity(one.bus_bandwidth, "B/s"),
                seconds(one.waited_ns),
                ""
                if one.late_rank is None
                else f"rank {one.late_rank} by {seconds(one.late_ns)}: {operation_text(one.late_operation)}",
            ]
            for one in ranks.collectives
        ]
        headers = [
            ("collective", False),
            ("bytes", True),
            ("ranks", True),
            ("calls", True),
            ("skew", True),
            ("transfer", True),
            ("bus bandwidth", True),
            ("waited, all ranks", True),
            ("late", False),
        ]
        found.append(Columns("Collectives", headers, rows))
    return found


def notes(ranks: Ranks) -> list[str]:
    """What a reader must know beside the tables: how the job was cut, missing ranks, what was left out."""
    found = []
    if ranks.missing:
        found.append(f"{len(ranks.missing)} of {ranks.world_size} ranks are not here: {_some(ranks.missing)}")
    if ranks.rounds is not None:
        found.append(f"compared in {ranks.rounds.said}")
        found += _between_threads(ranks)
    return found + ranks.notes


def _between_threads(ranks: Ranks) -> list[str]:
    """Ranks whose threads lose a part of the round that matters around collectives: it is in no rank's own
    time, for a machine with more threads than cores does that to any of them."""
    assert ranks.rounds is not None
    if not len(ranks.rounds):
        return []
    usual = float(np.median(ranks.rounds.end - ranks.rounds.start))
    return [
        f"rank {one.rank} loses {seconds(one.handed_ns)} a {ranks.rounds.unit} between its threads around "
        "collectives: they wait for a core, or do what is not recorded"
        for one in ranks.lateness
        if one.handed_ns > HANDED * usual
    ]


def _some(numbers: Sequence[int], most: int = 8) -> str:
    text = ", ".join(str(number) for number in numbers[:most])
    return text + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def to_json(ranks: Ranks) -> dict[str, Any]:
    """Plain data; times in nanoseconds, bandwidths in bytes a second."""
    return {
        "sentence": sentence(ranks),
        "ranks": ranks.ranks,
        "world_size": ranks.world_size,
        "missing": ranks.missing,
        "compared_in": None if ranks.rounds is None else ranks.rounds.said,
        "late": [one.rank for one in ranks.late],
        "lateness": [
            {**asdict(one), "cost": _finite(asdict(one)["cost"]), "late": one.late} for one in ranks.lateness
        ],
        "clocks": [asdict(clock) for clock in ranks.clocks],
        "collectives": [asdict(one) for one in ranks.collectives],
        "notes": notes(ranks),
    }


def _finite(cost: dict[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no infinity: an open end of an interval is null."""
    if cost is None:
        return None
    return {key: None if value in (float("inf"), float("-inf")) else value for key, value in cost.items()}
