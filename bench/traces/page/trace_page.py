"""The page of one trace, or of all ranks of a job."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report.page import write_whole
from bench.report.units import format_seconds, text_of
from bench.traces.events import Job, Kind, Trace
from bench.traces.page.document import render
from bench.traces.page.flame import CallTree, call_tree, flame
from bench.traces.page.packing import Words
from bench.traces.page.sections import Table, table
from bench.traces.page.timeline import Timeline, timeline

KIND_COLOURS = {
    Kind.KERNEL: "--c0",
    Kind.COMMUNICATION: "--c1",
    Kind.COPY: "--c2",
    Kind.SET: "--c2",
    Kind.OPERATOR: "--c5",
    Kind.FUNCTION: "--c4",
    Kind.RUNTIME: "--c6",
    Kind.SYNCHRONIZATION: "--c3",
    Kind.WAIT: "--c3",
    Kind.ANNOTATION: "--k-annotation",
    Kind.STEP: "--k-step",
    Kind.UNCLASSIFIED: "--alarm",
}


def write_trace_page(job: Job, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a job in one step and returns where; ValueError when it cannot be written."""
    return write_whole(render_trace_page(job), path)


def render_trace_page(job: Job) -> str:
    """The page of a job: one trace, or several ranks on a common clock."""
    words = Words()
    timed = [trace for trace in job.traces if trace.timed and len(trace.events)]
    offsets, aligned = clocks(timed)
    lines = timeline(timed, offsets, words) if timed else None
    tree = call_tree(job.traces)
    drawn = flame(tree, words) if len(tree) else None
    data = {
        "names": words.texts,
        "timeline": lines.data if lines else None,
        "flame": drawn.data if drawn else None,
    }
    title = text_of(Path(job.source).name or job.source, 80)
    return render(
        "trace.html.j2",
        data,
        title=title,
        sentence="",
        facts=facts(job),
        boxes=boxes(job),
        before=[],
        after=[],
        timeline_view=timeline_view(timed, lines, aligned) if lines else None,
        flame_view=flame_view(tree, drawn.data["weights"], drawn.merged) if drawn else None,
        made_by=f"Drawn by perflab trace from {len(job.traces)} profiler report{'s' * (len(job.traces) != 1)}.",
    )


def clocks(traces: Sequence[Trace]) -> tuple[list[int], str]:
    """Nanoseconds to add to each trace's times for a common clock, and how it was found."""
    if len(traces) < 2:
        return [0] * len(traces), ""
    if all(trace.origin_ns for trace in traces):
        first = min(trace.origin_ns for trace in traces)
        return [trace.origin_ns - first for trace in traces], "Ranks stand by the clocks of their machines."
    return [
        -int(trace.events.start.min()) for trace in traces
    ], "The files do not say when they began: each rank begins at 0, and what seems to happen together may not have."


def facts(job: Job) -> list[tuple[str, str]]:
    """What the reports say of themselves, once where all ranks say the same."""
    found: dict[str, list[str]] = {}
    for trace in job.traces:
        said = {"format": trace.format, **trace.facts}
        if trace.backend:
            said["backend"] = trace.backend
        if trace.world_size > 1:
            said["ranks"] = f"{len(job.traces)} of {trace.world_size}"
        for name, value in said.items():
            values = found.setdefault(text_of(name[:40], 40), [])
            if (shown := text_of(value[:120], 80)) not in values:
                values.append(shown)
    events = sum(len(trace.events) for trace in job.traces)
    named = [(name, ", ".join(values[:3]) + (" …" if len(values) > 3 else "")) for name, values in found.items()]
    return [*named, ("slices", f"{events:,}")]


def boxes(job: Job) -> list[tuple[str, bool, list[str]]]:
    """(title, alarm, lines): what could not be read, was dropped or not classified, and notes."""
    made = []
    if job.failures:
        lines = [f"{text_of(path[:200], 200)}: {text_of(why[:400], 400)}" for path, why in job.failures]
        made.append(("Files that could not be read", True, _first(lines)))
    dropped: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for trace in job.traces:
        dropped.update(trace.dropped)
        unknown.update(trace.unclassified)
    lines = [f"{count:,} {text_of(why[:200], 200)}" for why, count in dropped.most_common()]
    if lines:
        made.append(("Left out by the reader", False, _first(lines)))
    if unknown:
        kinds = [f"{text_of(name[:80], 60) or 'without a category'} ({count:,})" for name, count in unknown.most_common()]
        text = f"{sum(unknown.values()):,} slices are in no sum: {', '.join(_first(kinds, 12))}."
        made.append(("Not classified", False, [text]))
    notes = list(dict.fromkeys(text_of(note[:500], 400) for trace in job.traces for note in trace.notes))
    if notes:
        made.append(("Notes", False, _first(notes)))
    return made


def _first(lines: list[str], most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more"]


def timeline_view(traces: Sequence[Trace], drawn: Timeline, aligned: str) -> dict[str, Any]:
    counts = sum((np.bincount(trace.events.kind, minlength=len(Kind)) for trace in traces), np.zeros(len(Kind), int))
    lines = [aligned] if aligned else []
    if drawn.left_out:
        left = ", ".join(f"{count:,} {why}" for why, count in drawn.left_out.items())
        lines.append(f"{drawn.slices:,} slices are drawn. Left out of the drawing, but in every figure and table: {left}.")
    return {
        "lines": lines,
        "count": f"{drawn.slices:,}",
        "kinds": [(kind.name.lower(), variable, int(counts[kind])) for kind, variable in KIND_COLOURS.items() if counts[kind]],
    }


def flame_view(tree: CallTree, weights: Sequence[str], merged: int) -> dict[str, Any]:
    places = {"host": "of the host", "device": "of devices, by the call that launched it"}
    lines = ["Calls merged by their path of names, over all threads" + ", steps and ranks." ]
    if merged:
        lines.append(f"{merged:,} paths too small to be seen are put together below their callers, as “smaller”.")
    return {
        "title": "Call tree",
        "lines": lines,
        "places": [(name, places[name]) for name in weights],
        "widths": [],
        "table": tree_table(tree),
    }


def tree_table(tree: CallTree, most: int = 150) -> Table:
    """The largest paths of a call tree, callers before what they call."""
    host, device = tree.totals(tree.host), tree.totals(tree.device)
    sums = max(1, sum(tree.host)), max(1, sum(tree.device))
    share = np.maximum(host / sums[0], device / sums[1])
    kept = set(np.argsort(-share, kind="stable")[:most].tolist())
    children: dict[int, list[int]] = {}
    for number in sorted(kept, key=lambda number: -share[number]):
        children.setdefault(tree.parent[number], []).append(number)
    rows, waiting = [], [(number, 0) for number in reversed(children.get(-1, []))]
    while waiting:
        number, depth = waiting.pop()
        rows.append(
            [
                "· " * depth + tree.name[number],
                format_seconds(host[number] / 1e9),
                format_seconds(tree.host[number] / 1e9),
                format_seconds(device[number] / 1e9),
                f"{tree.calls[number]:,}",
            ]
        )
        waiting += [(child, depth + 1) for child in reversed(children.get(number, []))]
    columns = [("path", False), ("host", True), ("itself", True), ("device", True), ("calls", True)]
    return table(f"The {len(rows)} largest paths, as a table", columns, rows, most)
