"""The words around the two drawings: legend, what was left out, and the table that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.report.units import format_seconds
from bench.traces.events import Kind, Trace
from bench.traces.page.flame import CallTree, Flame, Overlay
from bench.traces.page.packing import Words
from bench.traces.page.sections import Cell, Table, table
from bench.traces.page.timeline import Timeline
from bench.traces.tables import amount

KIND_COLOURS = {
    "--c0": (Kind.KERNEL,),
    "--c1": (Kind.COMMUNICATION,),
    "--c2": (Kind.COPY, Kind.SET),
    "--c5": (Kind.OPERATOR,),
    "--c4": (Kind.FUNCTION,),
    "--c6": (Kind.RUNTIME,),
    "--c3": (Kind.SYNCHRONIZATION, Kind.WAIT),
    "--k-annotation": (Kind.ANNOTATION,),
    "--k-step": (Kind.STEP,),
    "--alarm": (Kind.UNCLASSIFIED,),
}
"""The style's colour of each kind; ``canvas.js`` has the same."""

_PATHS = 150  # rows of a call tree's table
_PLACES = {"host": "of the host", "device": "of devices"}


def timeline_view(
    traces: Sequence[Trace], drawn: Timeline, words: Words, lines: Sequence[str]
) -> dict[str, Any]:
    """What ``drawings.html.j2`` says around the timeline. lines: sentences to stand above it."""
    said = list(lines)
    if drawn.left_out:
        left = ", ".join(f"{count:,} {why}" for why, count in drawn.left_out.items())
        said.append(
            f"{drawn.slices:,} slices are drawn. Left out here, but in every figure and table: {left}."
        )
    if words.cut:
        said.append(f"{words.cut:,} names are too long for a page and cut in the drawings.")
    kinds = np.concatenate([trace.events.kind for trace in traces])
    counts = np.bincount(kinds, minlength=len(Kind))
    legend = []
    for variable, members in KIND_COLOURS.items():
        present = [kind for kind in members if counts[kind]]
        if present:
            name = " and ".join(kind.name.lower() for kind in present)
            legend.append((name, variable, int(sum(counts[kind] for kind in present))))
    return {"lines": said, "count": f"{drawn.slices:,}", "kinds": legend}


def flame_view(tree: CallTree, drawn: Flame, unit: str) -> dict[str, Any]:
    """What stands around the flame graph of one job. unit: as of ``Trace``."""
    lines = ["Calls merged by their path of names, over all threads, steps and ranks."]
    if "device" in drawn.data["weights"]:
        lines.append("Kernels hang below the call that launched them.")
    lines += _merged(drawn, tree)
    return {
        "title": "Call tree",
        "lines": lines,
        "places": [(name, _PLACES[name]) for name in drawn.data["weights"]],
        "widths": [],
        "table": tree_table(tree, unit),
    }


def _merged(drawn: Flame, tree: CallTree) -> list[str]:
    lines = []
    if drawn.merged:
        lines.append(f"{drawn.merged:,} paths too small to be seen are put together below their callers.")
    if tree.too_deep:
        lines.append(f"{tree.too_deep:,} slices lie deeper than the tree goes and are not in it.")
    return lines


def tree_table(tree: CallTree, unit: str) -> Table:
    """The largest paths of a call tree, callers before what they call. unit: as of ``Trace``."""
    host, device = tree.totals(tree.host), tree.totals(tree.device)
    share = np.maximum(host / max(1, sum(tree.host)), device / max(1, sum(tree.device)))
    rows: list[list[str | Cell]] = []
    for number, depth in paths(tree, share):
        times = (host[number], tree.host[number], device[number])
        row = ["· " * depth + tree.name[number], *(amount(time, unit) for time in times)]
        rows.append([*row, f"{tree.calls[number]:,}"])
    columns = [("path", False), ("host", True), ("host itself", True), ("device", True), ("calls", True)]
    return table(f"The {len(rows)} largest paths, as a table", columns, rows, _PATHS, folded=True)


def paths(tree: CallTree, share: np.ndarray) -> list[tuple[int, int]]:
    """(node, depth) of the nodes with the largest share, a caller before what it calls, larger ones first."""
    kept = np.argsort(-share, kind="stable")[:_PATHS].tolist()
    children: dict[int, list[int]] = {}
    for number in kept:
        children.setdefault(tree.parent[number], []).append(number)
    found, waiting = [], [(number, 0) for number in reversed(children.get(-1, []))]
    while waiting:
        number, depth = waiting.pop()
        found.append((number, depth))
        waiting += [(child, depth + 1) for child in reversed(children.get(number, []))]
    return found


def difference_view(both: Overlay, drawn: Flame) -> dict[str, Any]:
    """What stands around the flame graph of a difference."""
    lines = [
        "Calls of both merged by their path of names; times are a step's, the mean over all steps and ranks."
    ]
    weights = drawn.data["weights"]
    places = [place for place in _PLACES if {f"base_{place}", f"new_{place}"} & set(weights)]
    return {
        "title": "Call tree: what became longer and shorter",
        "lines": lines + _merged(drawn, both.tree),
        "places": [(place, _PLACES[place]) for place in places],
        "widths": [("larger", "of the longer one"), ("new", "of new"), ("base", "of base")],
        "table": difference_table(both, places),
    }


def difference_table(both: Overlay, places: Sequence[str]) -> Table:
    """The paths that changed most, by the time of these places (host, device)."""
    totals = {name: both.tree.totals(own.tolist()) for name, own in both.weights.items()}
    change = np.zeros(len(both.tree), np.int64)
    for place in places:
        change = np.maximum(change, np.abs(totals[f"new_{place}"] - totals[f"base_{place}"]))
    columns = [("call", False)]
    for place in places:
        columns += [(f"{place} base", True), (f"{place} new", True)]
    rows: list[list[str | Cell]] = []
    for number in np.argsort(-change, kind="stable")[:_PATHS].tolist():
        times = [totals[f"{side}_{place}"][number] for place in places for side in ("base", "new")]
        above = " › ".join(both.tree.path(number)[-4:-1])
        rows.append([both.tree.name[number], *(format_seconds(time / 1e9) for time in times), above])
    columns.append(("called from", False))
    return table(f"The {len(rows)} paths that changed most, as a table", columns, rows, _PATHS, folded=True)
