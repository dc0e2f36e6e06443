"""The tables of what a trace says: plain text, the longest first, and what is not shown is counted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.report.units import NOTHING, format_quantity
from bench.traces.analysis import Analysis
from bench.traces.analysis_text import LONGEST_NAME, exposed_names, short
from bench.traces.breakdown import Parts
from bench.traces.events import Kind
from bench.traces.operations import Operation
from bench.traces.tables import Columns, amount, percent, seconds

TOP = 10


def tables(analysis: Analysis, top: int = TOP, longest: int = LONGEST_NAME) -> list[Columns]:
    """All that have rows but ``time_table``. top: rows of each. longest: letters of a name."""
    found = [_steps(analysis, top), _idle(analysis, top, longest)]
    found += [_waits(analysis, longest), _collectives(analysis, top, longest)]
    found += [_kernels(analysis, top, longest), *_operations(analysis, top, longest)]
    found += [_lanes(analysis, top, longest), _memory(analysis)]
    return [table for table in found if table.rows]


_PARTS = [
    ("span", True),
    ("compute", True),
    ("exposed comm.", True),
    ("copies", True),
    ("idle", True),
    ("comm. hidden", True),
]


def _parts(parts: Parts) -> list[str]:
    cells = [percent(getattr(parts, name), parts.span) for name in ("compute", "exposed", "copies", "idle")]
    hidden = percent(parts.overlapped, parts.communication)
    return [seconds(parts.span), *cells, hidden]


def time_table(analyses: Sequence[Analysis]) -> Columns:
    """Where the time went, a row for each device (or host) of each trace."""
    rows = []
    for analysis in analyses:
        rank = f"rank {analysis.trace.rank} " if len(analyses) > 1 and analysis.trace.rank >= 0 else ""
        rows += [[f"{rank}{unit.activity.name}", *_parts(unit.whole)] for unit in analysis.units]
    return Columns("Time", [("of", False), *_PARTS], rows)


def _steps(analysis: Analysis, top: int) -> Columns:
    marked, parts = analysis.steps, analysis.by_step
    if not parts:
        return Columns("Steps", [("step", False), *_PARTS], [])
    whole = [part.span for part, complete in zip(parts, marked.complete, strict=True) if complete]
    below = []
    if len(whole) > 1:
        below.append(
            f"median of {len(whole)} complete steps: {seconds(median(whole))}, longest {seconds(max(whole))}"
        )
    chosen = range(len(parts))
    if len(parts) > top:
        longest = sorted(chosen, key=lambda place: -parts[place].span)[:top]
        chosen = sorted(longest)  # type: ignore[assignment]
        below.append(f"the {top} longest of {len(parts)} steps are shown")
    rows = []
    for place in chosen:
        mark = "" if marked.complete[place] else " (not complete)"
        rows.append([short(marked.names[place]) + mark, *_parts(parts[place])])
    return Columns("Steps", [("step", False), *_PARTS], rows, tuple(below))


def _idle(analysis: Analysis, top: int, longest: int) -> Columns:
    title = "Why devices were idle" if analysis.on_device else "What the host did outside operators"
    many = len(analysis.units) > 1
    rows, below = [], []
    for unit in analysis.units:
        name = [unit.activity.name] if many else []
        for reason in unit.idle[:top]:
            share = percent(reason.time, unit.whole.idle)
            rows.append(
                [*name, short(reason.text(), longest + 30), seconds(reason.time), share, str(reason.pieces)]
            )
        rest = unit.idle[top:]
        if rest:
            sums = sum(reason.time for reason in rest)
            below.append(f"{len(rest)} more causes: {seconds(sums)}, {percent(sums, unit.whole.idle)}")
    first = [("of", False)] if many else []
    columns = [*first, ("cause", False), ("time", True), ("of idle", True), ("pieces", True)]
    return Columns(title, columns, rows, tuple(below))


def _waits(analysis: Analysis, longest: int) -> Columns:
    rows = [
        [unit.activity.name, short(reason.text(), longest + 30), seconds(reason.time), str(reason.pieces)]
        for unit in analysis.units
        for reason in unit.waits
    ]
    title = "What the busiest stream waited for, launched but not started"
    return Columns(title, [("of", False), ("wait for", False), ("time", True), ("pieces", True)], rows)


def _collectives(analysis: Analysis, top: int, longest: int) -> Columns:
    names = exposed_names(analysis.units)
    shown, exposed = names.most_common(top), names.total()
    rows = [[short(name, longest), seconds(time), percent(time, exposed)] for name, time in shown]
    rest = exposed - sum(time for _, time in shown)
    below = (f"{len(names) - len(shown)} more collectives: {seconds(rest)}",) if rest else ()
    columns = [("collective", False), ("time", True), ("of exposed", True)]
    return Columns("Exposed communication", columns, rows, below)


def _kernels(analysis: Analysis, top: int, longest: int) -> Columns:
    total = sum(kernel.time for kernel in analysis.kernels)
    rated = any(kernel.bytes_per_second is not None for kernel in analysis.kernels[:top])
    rows = []
    for kernel in analysis.kernels[:top]:
        more = f" and {kernel.operators - 1} more" if kernel.operators > 1 else ""
        cells = [short(kernel.name, longest), short(kernel.operator, longest // 2) + more, str(kernel.calls)]
        cells += [
            seconds(kernel.time),
            percent(kernel.time, total),
            seconds(kernel.time / max(kernel.calls, 1)),
        ]
        rate = kernel.bytes_per_second
        rows.append(cells + ([NOTHING if rate is None else format_quantity(rate, "B/s")] if rated else []))
    columns = [("runs on devices", False), ("for operator", False), ("calls", True), ("time", True)]
    columns += [("of all", True), ("mean", True), *([("rate", True)] if rated else [])]
    rest = analysis.kernels[top:]
    below = [f"{len(rest)} more: {seconds(sum(kernel.time for kernel in rest))}"] if rest else []
    return Columns("Kernels, copies and collectives", columns, rows, tuple(below))


def _operations(analysis: Analysis, top: int, longest: int) -> list[Columns]:
    by_self = analysis.operations
    by_device = sorted((one for one in by_self if one.device_time), key=lambda one: -one.device_time)
    title = "Operators by the device time of what they launched"
    found = [_operation_table(title, analysis, by_device, top, longest, "device_time")]
    return [
        *found,
        _operation_table("Operations of the host by self time", analysis, by_self, top, longest, "self_time"),
    ]


def _operation_table(
    title: str, analysis: Analysis, listed: list[Operation], top: int, longest: int, key: str
) -> Columns:
    shown, rated = listed[:top], any(one.flops_per_second is not None for one in listed[:top])
    roofed = analysis.roof is not None and rated
    total, unit = getattr(analysis.sums, key), analysis.trace.unit
    rows = []
    for one in shown:
        name = short(one.name, longest) + (f" {short(one.shape, longest)}" if one.shape else "")
        time = getattr(one, key)
        mean = time / max(one.calls, 1)
        cells = [name, str(one.calls), amount(time, unit), percent(time, total), amount(mean, unit)]
        if rated:
            rate = one.flops_per_second
            cells.append(NOTHING if rate is None else format_quantity(rate, "FLOP/s"))
        if roofed:
            cells.append(NOTHING if one.of_roof is None else percent(one.of_roof, 1))
        rows.append(cells)
    columns = [
        ("operation and shapes", False),
        ("calls", True),
        ("taken" if unit else "time", True),
        ("of all", True),
        ("mean", True),
    ]
    columns += [("rate", True)] if rated else []
    columns += [(f"of {analysis.roof.of}", True)] if roofed and analysis.roof else []
    more = len(listed) - len(shown)
    hidden = analysis.operation_count - len(listed) if key == "self_time" else 0
    below = [f"{more + hidden} more operations"] if more + hidden > 0 else []
    return Columns(title, columns, rows, tuple(below))


def _lanes(analysis: Analysis, top: int, longest: int) -> Columns:
    rows = []
    for time in analysis.lanes[:top]:
        lane = analysis.trace.lanes[time.lane]
        kinds = [kind for kind in time.by_kind if kind not in (Kind.STEP, Kind.ANNOTATION)]
        kinds.sort(key=lambda kind: -time.by_kind[kind])
        mostly = ", ".join(f"{kind.name.lower()} {seconds(time.by_kind[kind])}" for kind in kinds[:3])
        rows.append(
            [short(f"{lane.process}, {lane.thread}", longest), str(time.slices), seconds(time.busy), mostly]
        )
    more = len(analysis.lanes) - len(rows)
    below = (f"{more} more threads and streams",) if more > 0 else ()
    columns = [
        ("thread or stream", False),
        ("slices", True),
        ("busy", True),
        ("by kind, nested slices in both", False),
    ]
    return Columns("Threads and streams", columns, rows, below)


def _memory(analysis: Analysis) -> Columns:
    rows = []
    for use in analysis.memory:
        sizes = (use.peak, use.first, use.last)
        peak, first, last = (format_quantity(size, "B") for size in sizes)
        growth = NOTHING if use.growth is None else format_quantity(use.growth, "B")
        place = " ".join(short(text, 40) for text in (use.peak_step, use.peak_operator) if text) or NOTHING
        name = "host" if use.device < 0 else f"device {use.device}"
        rows.append([name, peak, seconds(use.peak_time), place, first, last, growth])
    columns = [("memory of", False), ("peak", True), ("at", True), ("in", False)]
    columns += [("first", True), ("last", True), ("left by a step", True)]
    return Columns("Memory", columns, rows)
