"""A comparison of two reports for a terminal, a pull request and a program."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench.report.units import NOTHING, format_seconds, text_of
from bench.traces.diff import Difference, Row
from bench.traces.diff_sentence import label, shapes, short_name, signed

if TYPE_CHECKING:
    from rich.console import Console

TOP = 20
_COLUMNS = (
    ("what takes time in the step", False),
    ("adds", True),
    ("of the step", True),
    ("95 % interval", True),
    ("base", True),
    ("new", True),
    ("calls", True),
    ("change", False),
)
_NARROW = (0, 1, 4, 5, 7)  # columns that a terminal of 80 letters holds
_WIDE = 130


def to_json(difference: Difference) -> dict[str, Any]:
    """All of it; seconds are seconds of one step, an interval that is not known is null."""
    step = difference.step
    return {
        "sentence": difference.sentence,
        "verdict": step.verdict,
        "base": difference.base,
        "new": difference.new,
        "step": {
            "base_seconds": difference.base_seconds,
            "new_seconds": difference.new_seconds,
            "seconds": difference.seconds,
            "ratio": step.ratio,
            "low": step.low if math.isfinite(step.high) else None,
            "high": step.high if math.isfinite(step.high) else None,
            "base_steps": difference.base_steps,
            "new_steps": difference.new_steps,
            "marked": difference.steps_given,
            "bound_by": "device" if difference.on_device else "host",
            "alike": difference.alike,
            "in_turns": difference.in_turns,
        },
        "rows": [asdict(row) for row in difference.rows],
        "ranks": [asdict(rank) for rank in difference.ranks],
        "notes": difference.notes,
    }


def to_markdown(difference: Difference, top: int = TOP) -> str:
    from bench.report.markdown import code, escape, table_lines

    rows = [
        (code(text_of(_name(row), 120)), *_figures(row), escape(_what_changed(row)))
        for row in shown(difference, top)
    ]
    header = tuple(name for name, _ in _COLUMNS)
    lines = [f"**{escape(difference.sentence)}**", ""]
    lines += [f"- {escape(text_of(note))}" for note in (_about_step(difference), *difference.notes)]
    lines += ["", *table_lines(header, "lrrrrrrl", rows), *_rest(difference, top)]
    if len(difference.ranks) > 1:
        ranks = [
            (str(r.rank), *map(format_seconds, (r.base_seconds, r.new_seconds))) for r in difference.ranks
        ]
        lines += ["", *table_lines(("rank", "base step", "new step"), "rrr", ranks)]
    return "\n".join(lines).rstrip() + "\n"


def print_difference(difference: Difference, console: Console, top: int = TOP) -> None:
    from rich.text import Text

    from bench.report.lines import encodable, new_table, print_line

    print_line(console, difference.sentence, "bold")
    print_line(console, _about_step(difference), "dim")
    for note in difference.notes:
        print_line(console, f"note: {text_of(note)}", "yellow")
    wide = console.width >= _WIDE
    columns = range(len(_COLUMNS)) if wide else _NARROW
    table = new_table("", console, *(_COLUMNS[index] for index in columns))
    if not wide:  # the numbers are not wrapped; the words share what they leave
        table.columns[0].max_width = max(12, console.width - 46)
        table.columns[-1].max_width = 14
    style = {"slower": "red", "faster": "green"}
    for row in shown(difference, top):
        cells = (text_of(_name(row), 90), *_figures(row), _what_changed(row, with_kernels=wide))
        texts = (Text(encodable(cells[index], console)) for index in columns)
        table.add_row(*texts, style=style.get(row.verdict))
    console.print(table)
    for line in _rest(difference, top):
        print_line(console, line, "dim")
    if len(difference.ranks) > 1:
        print_line(console, "the median step of each rank", before=1)
        ranks = new_table("", console, ("rank", True), ("base", True), ("new", True))
        for rank in difference.ranks:
            ranks.add_row(str(rank.rank), format_seconds(rank.base_seconds), format_seconds(rank.new_seconds))
        console.print(ranks)


def shown(difference: Difference, top: int) -> list[Row]:
    """The first ``top`` rows and what is alike."""
    rows = [row for row in difference.rows if row.what != "alike"][:top]
    return rows + [row for row in difference.rows if row.what == "alike"]


def _rest(difference: Difference, top: int) -> list[str]:
    rest = [row for row in difference.rows if row.what != "alike"][top:]
    if not rest:
        return []
    return [f"{len(rest)} more rows add {signed(sum(row.seconds for row in rest))} in all"]


def _about_step(difference: Difference) -> str:
    step = difference.step
    known = math.isfinite(step.high)
    interval = f" [{step.low:.3f}, {step.high:.3f}]" if known else ""
    bound = "device" if difference.on_device else "host"
    turns = f", recorded in {difference.in_turns} turns" if difference.in_turns else ""
    return (
        f"step {format_seconds(difference.base_seconds)} and {format_seconds(difference.new_seconds)}: "
        f"new/base {step.ratio:.3f}x{interval}, {step.verdict}; {difference.base_steps} and "
        f"{difference.new_steps} steps, bound by the {bound}{turns}"
    )


def _name(row: Row) -> str:
    around = f"{row.path[0]} > " if row.path else ""
    return f"{around}{label(row)}"


def _figures(row: Row) -> tuple[str, ...]:
    known = row.low is not None and row.high is not None
    interval = f"{signed(row.low)} to {signed(row.high)}" if known else "unknown"  # type: ignore[arg-type]
    calls = f"{row.base_calls:.4g} to {row.new_calls:.4g}"
    if row.base_calls == row.new_calls:
        calls = f"{row.base_calls:.4g}" if row.base_calls else NOTHING
    return (
        signed(row.seconds),
        f"{row.share * 100:+.1f} %",
        NOTHING if row.what == "alike" else interval,
        format_seconds(row.base_seconds),
        format_seconds(row.new_seconds),
        calls,
    )


def _what_changed(row: Row, with_kernels: bool = True) -> str:
    """The change of structure and the verdict, and which kernels took the place of which."""
    words = [part for part in (row.verdict, row.change) if part]
    if row.change == "other shapes" and row.other_shapes:
        words[-1] = f"now {shapes(row.other_shapes)}"
    if with_kernels and row.change in ("other kernels", "other implementation"):
        longest = [short_name(kernels[0][0]) for kernels in (row.base_kernels, row.new_kernels) if kernels]
        words[-1] += f": {' to '.join(longest)}" if len(longest) == 2 else ""
    return ", ".join(words)
