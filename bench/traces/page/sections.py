"""What stands on a page as text: tables whose cells are ready to read, and cards of figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.report.page import FigureView
from bench.report.units import text_of

LONGEST_CELL = 300  # letters; a C++ kernel's name has a thousand


@dataclass(frozen=True)
class Table:
    """header and rows are text; numeric: which columns stand to the right. left_out: a sentence, or ""."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    left_out: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A card of the page."""

    title: str
    lines: Sequence[str] = ()
    figures: Sequence[FigureView] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def table(
    title: str,
    columns: Sequence[tuple[str, bool]],
    rows: Iterable[Sequence[object]],
    most: int = 60,
    folded: bool = False,
) -> Table:
    """A table of at most that many rows; columns are (header, is it a number). All text is made printable."""
    cells = [[text_of(str(cell)[: LONGEST_CELL + 1], LONGEST_CELL) for cell in row] for row in rows]
    more = len(cells) - most
    return Table(
        title,
        [name for name, _ in columns],
        cells[:most],
        [number for _, number in columns],
        f"{more:,} more rows are in perflab's --json output." if more > 0 else "",
        folded,
    )
