"""A report of a trace on a terminal or in a log: whole without colour, at any width."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from bench.report.lines import encodable, new_table, print_line
from bench.report.units import text_of
from bench.traces.job_report import JobReport, parts, sentence
from bench.traces.tables import Columns

if TYPE_CHECKING:
    from rich.console import Console

_FIGURES = 50  # columns that the numbers of a table take
_SHORTEST = 28  # letters that a name keeps at any width
_HEADER = 9  # letters that a header may have without a cell that long


def print_report(report: JobReport, console: Console, top: int) -> None:
    """The sentence, what is to know beside it, and the tables. top: rows of a table."""
    print_line(console, text_of(sentence(report)), "bold")
    longest = max(_SHORTEST, console.width - _FIGURES)
    for part in parts(report, top, longest):
        if part.title:
            print_line(console, text_of(part.title), "bold", before=1)
        for line in part.lines:
            print_line(console, text_of(line), "dim")
        for table in part.tables:
            print_table(table, console)


def print_table(table: Columns, console: Console) -> None:
    """A table with its title and the lines that belong under it."""
    from rich.text import Text

    console.print()
    table = table.filled()
    cells = zip(*table.rows, strict=True)
    widths = [max(_HEADER, *(len(cell) for cell in column)) for column in cells]
    # A header longer than its column breaks into lines: numbers are not wrapped, and headers would not be.
    headers = ["\n".join(wrap(name, width)) for (name, _), width in zip(table.columns, widths, strict=True)]
    columns = [(header, number) for header, (_, number) in zip(headers, table.columns, strict=True)]
    drawn = new_table(table.title, console, *columns)
    for row in table.rows:
        drawn.add_row(*(Text(encodable(text_of(cell), console)) for cell in row))
    console.print(drawn)
    for line in table.below:
        print_line(console, text_of(line), "dim")
