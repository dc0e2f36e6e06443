"""The page of two jobs: what changed, and what each change does to the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.report.page import write_text
from bench.report.units import format_interval, format_quantity, format_seconds, text_of
from bench.traces.diff import Difference, Row
from bench.traces.diff_sentence import label, signed
from bench.traces.events import Job, Trace
from bench.traces.page import reports, views
from bench.traces.page.document import render
from bench.traces.page.flame import call_tree, difference_flame, overlay
from bench.traces.page.packing import Words
from bench.traces.page.sections import Cell, Section, Table, as_sentence, table
from bench.traces.page.timeline import timeline
from bench.traces.steps import steps

_ROWS = 60  # of a table


def write_difference_page(base: Job, new: Job, difference: Difference, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a comparison in one step and returns where; ValueError when it cannot be written."""
    return write_text(render_difference_page(base, new, difference), path)


def render_difference_page(base: Job, new: Job, difference: Difference) -> str:
    """The page of a comparison. difference: of these two jobs."""
    words = Words()
    sides = [("base", base), ("new", new)]
    traces: list[Trace] = []
    titles: list[str] = []
    for side, job in sides:
        timed = [trace for trace in job.traces if trace.timed and len(trace.events)]
        traces += timed
        titles += reports.titles(timed, side)
    drawn = timeline(traces, reports.own_clocks(traces), titles, words) if traces else None
    both = overlay(call_tree(base.traces), call_tree(new.traces), (_steps(base.traces), _steps(new.traces)))
    frames = difference_flame(both, words) if len(both.tree) else None
    boxes = [box for side, job in sides for box in reports.boxes(job, side)]
    if difference.notes:
        boxes.insert(
            0, ("Notes on this comparison", False, [text_of(note[:500], 400) for note in difference.notes])
        )
    return render(
        "trace.html.j2",
        {
            "timeline": drawn.data if drawn else None,
            "flame": frames.data if frames else None,
            "names": words.texts,
        },
        title=f"{reports.name_of(base)} and {reports.name_of(new)}",
        sentence=as_sentence(difference.sentence),
        facts=_facts(difference),
        left_out=[f"{side}: {line}" for side, job in sides if (line := reports.left_out(job))],
        boxes=boxes,
        before=_before(difference),
        after=[],
        timeline_view=views.timeline_view(traces, drawn, words, ["Both begin at 0."]) if drawn else None,
        flame_view=views.difference_view(both, frames) if frames else None,
        made_by="perflab compare",
    )


def _steps(traces: Sequence[Trace]) -> int:
    """Over how many steps the slices of these traces are spread, all ranks together."""
    return max(1, sum(len(steps(trace)) for trace in traces))


def _facts(difference: Difference) -> list[tuple[str, str]]:
    step = difference.step
    unit = "step" if difference.steps_given else "recording"
    found = [
        (f"base {unit}", f"{format_seconds(difference.base_seconds)} ({difference.base_steps:,} compared)"),
        (f"new {unit}", f"{format_seconds(difference.new_seconds)} ({difference.new_steps:,} compared)"),
        ("new over base", format_interval("ratio", step.ratio, step.low, step.high)),
        ("verdict", step.verdict),
    ]
    if difference.alike != 1.0:
        found.append(("alike in all operations", format_quantity(difference.alike, "x")))
    return found


def _before(difference: Difference) -> list[Section]:
    unit = "step" if difference.steps_given else "recording"
    tables = [_rows_table(difference.rows, unit)]
    if len(difference.ranks) > 1:
        tables.append(_ranks_table(difference))
    return [
        Section(
            f"What the change of the {unit} is made of",
            [f"Each row says what it adds to the {unit}; all of them add up to the change."],
            tables=tables,
            legend=[("longer", "--alarm"), ("shorter", "--c0")],
        )
    ]


def _rows_table(rows: Sequence[Row], unit: str) -> Table:
    columns = [
        ("operation", False),
        (f"adds to the {unit}", True),
        ("verdict", False),
        ("base", True),
        ("new", True),
        ("calls", True),
        ("longest kernel", False),
    ]
    largest = max((abs(row.seconds) for row in rows), default=0.0) or 1.0
    cells: list[list[str | Cell]] = []
    for row in rows:
        interval = ""
        if row.low is not None and row.high is not None:
            interval = f"[{signed(row.low)}, {signed(row.high)}]"
        calls = f"{row.base_calls:.4g}"
        if row.new_calls != row.base_calls:
            calls += f" → {row.new_calls:.4g}"
        bar = ((round(100 * abs(row.seconds) / largest, 2), "--alarm" if row.seconds > 0 else "--c0"),)
        above = f"in {' › '.join(row.path[-2:])}" if row.path else ""
        cells.append(
            [
                Cell(label(row), above, bar),
                Cell(signed(row.seconds), interval),
                Cell(row.verdict, row.change),
                format_seconds(row.base_seconds),
                format_seconds(row.new_seconds),
                calls,
                _kernels(row),
            ]
        )
    return table("Each change", columns, cells, _ROWS)


def _kernels(row: Row) -> str:
    """The longest kernel, or the longest before and after where they are not the same."""
    before, after = ([name for name, _ in kernels[:1]] for kernels in (row.base_kernels, row.new_kernels))
    return " → ".join(name[:60] for name in dict.fromkeys([*before, *after]))


def _ranks_table(difference: Difference) -> Table:
    cells = [
        [
            f"rank {rank.rank}" if rank.rank >= 0 else "unknown",
            format_seconds(rank.base_seconds),
            format_seconds(rank.new_seconds),
            signed(rank.new_seconds - rank.base_seconds),
        ]
        for rank in difference.ranks
    ]
    columns = [("rank", False), ("base", True), ("new", True), ("change", True)]
    return table("The median step of each rank", columns, cells, _ROWS)
