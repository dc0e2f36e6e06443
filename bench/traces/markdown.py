"""A report of a trace as Markdown, for a comment on a pull request."""

from __future__ import annotations

from string import ascii_letters, digits

from bench.report.markdown import code, escape, table_lines
from bench.report.units import text_of
from bench.traces.job_report import JobReport, parts, sentence
from bench.traces.tables import Columns

_LONGEST_NAME = 80
_OF_FIGURES = frozenset(ascii_letters + digits + " .,%/+")


def to_markdown(report: JobReport, top: int) -> str:
    """The sentence, what is to know beside it, and the tables. top: rows of a table."""
    lines = [f"**{escape(text_of(sentence(report)))}**", ""]
    for part in parts(report, top, _LONGEST_NAME):
        lines += [f"### {escape(text_of(part.title))}", ""] if part.title else []
        lines += [f"- {escape(text_of(line))}" for line in part.lines]
        lines += [""] if part.lines else []
        for table in part.tables:
            lines += _table(table)
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Columns) -> list[str]:
    """Text in cells is shown as code, so that names are neither markup nor broken at odd places."""
    table = table.filled()
    numeric = [number for _, number in table.columns]
    rows = [
        [
            _figure(cell) if number or not cell else code(text_of(cell))
            for cell, number in zip(row, numeric, strict=True)
        ]
        for row in table.rows
    ]
    header = [escape(name) for name, _ in table.columns]
    lines = [f"**{escape(table.title)}**", ""] if table.title else []
    lines += table_lines(header, "".join("r" if number else "l" for number in numeric), rows)
    return lines + [f"{escape(text_of(line))}\n" for line in table.below]


def _figure(cell: str) -> str:
    """A number with its unit as it is: escaped it could not be copied."""
    return cell if set(cell) <= _OF_FIGURES else escape(text_of(cell))
