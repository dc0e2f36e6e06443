"""The cards of a trace's page: where the time went, the ranks, and one trace in detail."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from bench.report.page import FigureView, view
from bench.traces import analysis_tables, analysis_text, ranks_text
from bench.traces.analysis import Analysis
from bench.traces.breakdown import Parts
from bench.traces.job_report import JobReport
from bench.traces.page.sections import Cell, Section, Table, as_sentence, table
from bench.traces.ranks import Ranks
from bench.traces.tables import Columns, percent, seconds
from labs.figure import Chart, Series

_STEPS = 40  # rows in the table of steps; the timeline has all
_ROWS = 50  # of any other table
_NAME = 240  # letters of a name; what does not fit its cell is cut by the style
_POINTS = 250  # of a curve of memory
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_PARTS = {
    "compute": ("compute", "--c0"),
    "exposed": ("exposed communication", "--c1"),
    "copies": ("copies", "--c2"),
    "idle": ("idle", "--grid"),
}


def time_section(report: JobReport) -> Section | None:
    """How the time is divided, by rank and by step; None where nothing has a place in time."""
    one, tables = report.detailed, []
    known = [analysis for analysis in report.analyses if analysis.whole is not None]
    if len(known) > 1:
        rows = [
            (f"rank {each.trace.rank}" if each.trace.rank >= 0 else each.trace.source, each.whole)
            for each in known
        ]
        tables.append(_parts_table("By rank", "rank", rows))
    if one.by_step:
        of = f" of rank {one.trace.rank}" if len(known) > 1 else ""
        rows = list(zip(one.steps.names, one.by_step, strict=True))
        tables.append(_parts_table(f"By step{of}", "step", rows))
    if one.units and len(known) == 1 and (len(one.units) > 1 or not one.by_step):
        rows = [(unit.activity.name, unit.whole) for unit in one.units]
        tables.append(_parts_table("By device" if one.on_device else "The whole", "of", rows))
    if not tables:
        return None
    lines = [as_sentence(one.steps.sentence())]
    if not one.on_device:
        lines.append("No device is in the report: compute is what operators on the host take.")
    return Section("Where the time went", lines, tables=tables, legend=list(_PARTS.values()))


def _parts_table(title: str, of: str, rows: Sequence[tuple[str, Parts | None]]) -> Table:
    known = [(name, parts) for name, parts in rows if parts is not None]
    longest = max(parts.span for _, parts in known) or 1
    shown = {
        part: word for part, (word, _) in _PARTS.items() if any(getattr(each, part) for _, each in known)
    }
    hidden = any(parts.communication for _, parts in known)
    columns = [(of, False), ("", False), ("span", True), *((word, True) for word in shown.values())]
    cells = []
    for name, parts in known:
        bar = tuple(
            (round(100 * getattr(parts, part) / longest, 2), variable)
            for part, (_, variable) in _PARTS.items()
        )
        row = [Cell(name), Cell("", bar=bar), Cell(seconds(parts.span))]
        row += [
            Cell(seconds(getattr(parts, part)), percent(getattr(parts, part), parts.span)) for part in shown
        ]
        cells.append(row + [Cell(percent(parts.overlapped, parts.communication))] * hidden)
    return table(title, columns + [("communication hidden", True)] * hidden, cells, _STEPS)


def ranks_section(ranks: Ranks) -> Section:
    """Who waits for whom, and what the collectives cost."""
    lines = [as_sentence(line) for line in ranks_text.notes(ranks)]
    return Section("The ranks beside each other", lines, tables=_tables(ranks_text.tables(ranks)))


def detail_section(report: JobReport) -> Section | None:
    """Idle time, kernels, operations, threads and memory of one trace."""
    one = report.detailed
    found = [each for each in analysis_tables.tables(one, _ROWS, _NAME) if each.title != "Steps"]
    if not found:
        return None
    title, lines = "In detail", []
    if report.ranks is not None:
        title = f"Rank {one.trace.rank} in detail" if one.trace.rank >= 0 else "One of them in detail"
        lines.append(as_sentence(analysis_text.sentence(one)))
    if one.unlinked and one.on_device:
        lines.append(f"The launch of {one.unlinked:,} slices on devices is not in the report.")
    return Section(title, lines, _memory(one), _tables(found))


def _tables(found: Sequence[Columns]) -> list[Table]:
    return [_with_bars(each) for each in found if each.rows]


def _with_bars(found: Columns) -> Table:
    """A table of text as one of the page; where a column says its row's share, it is drawn below the name."""
    shares = [place for place, (header, _) in enumerate(found.columns) if header.startswith("of ")]
    rows: list[list[str | Cell]] = []
    for row in found.rows:
        cells: list[str | Cell] = list(row)
        share = re.match(r"[\d.]+(?= %)", row[shares[0]]) if shares else None
        if share:
            cells[0] = Cell(row[0], bar=((float(share[0]), "--c5"),))
        rows.append(cells)
    return table(found.title, found.columns, rows, len(rows), left_out="; ".join(found.below))


def _memory(analysis: Analysis) -> list[FigureView]:
    """Allocated memory over time, in the unit that suits its peak; of points too many to see the highest."""
    if not analysis.memory:
        return []
    peak = max(use.peak for use in analysis.memory)
    unit, size = next(((unit, size) for unit, size in _SIZES if peak >= size), ("B", 1))
    series = []
    for use in analysis.memory:
        place = f"device {use.device}" if use.device >= 0 else "host"
        step = math.ceil(len(use.curve) / _POINTS)
        highest = [
            max(use.curve[i : i + step], key=lambda point: point[1]) for i in range(0, len(use.curve), step)
        ]
        times = [(at - use.curve[0][0]) / 1e9 for at, _ in highest]
        series.append(Series(place, times, [amount / size for _, amount in highest], "line"))
    return [view(Chart("Allocated memory", "time (s)", f"allocated ({unit})", series), "memory")]
