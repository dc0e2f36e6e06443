"""What stands on a page as text: tables whose cells are ready to read, and cards of figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.report.page import FigureView
from bench.report.units import text_of

LONGEST_CELL = 300  # letters; a C++ kernel's name has a thousand


@dataclass(frozen=True)
class Cell:
    """A table's cell. sub: a second, quieter line. bar: parts as (percent of its width, style variable)."""

    text: str
    sub: str = ""
    bar: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """columns: (header, its cells are numbers). left_out: a sentence on rows that are not here, or "".

    folded: the whole table stands in a fold already; others fold what comes after their first rows.
    """

    title: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]
    left_out: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A card of the page. legend: (word, style variable) of the bars in its tables."""

    title: str
    lines: Sequence[str] = ()
    figures: Sequence[FigureView] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[tuple[str, str]] = ()


def table(
    title: str,
    columns: Sequence[tuple[str, bool]],
    rows: Iterable[Sequence[str | Cell]],
    most: int,
    *,
    left_out: str = "",
    folded: bool = False,
) -> Table:
    """A table of at most that many rows, its text made printable and cut where it is endless.

    left_out: what to say below it; otherwise rows beyond ``most`` are counted there.
    """
    cells = [[_printable(cell if isinstance(cell, Cell) else Cell(cell)) for cell in row] for row in rows]
    more = len(cells) - most
    said = _cut(left_out) or (f"{more:,} more rows are in perflab's --json output." if more > 0 else "")
    return Table(_cut(title), [(_cut(name), number) for name, number in columns], cells[:most], said, folded)


def _printable(cell: Cell) -> Cell:
    return Cell(_cut(cell.text), _cut(cell.sub), cell.bar)


def _cut(text: str) -> str:
    return text_of(text[: LONGEST_CELL + 1], LONGEST_CELL)


def as_sentence(text: str) -> str:
    """Words of a stranger's names among ours: printable, of bounded length, from a capital to a full stop."""
    shown = text_of(text[:2000], 1200)
    return f"{shown[:1].upper()}{shown[1:]}." if shown else ""
