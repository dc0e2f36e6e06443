"""Tables of text, which terminal, Markdown and page draw each in their way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.report.units import NOTHING, format_quantity, format_seconds


@dataclass(frozen=True)
class Columns:
    """A table in plain text. columns: (header, cells are numbers). rows: text, with names as in the file.

    below: lines that belong under it, such as how many rows are not shown.
    """

    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[str]]
    below: tuple[str, ...] = ()

    def filled(self) -> Columns:
        """Without the columns in which no row has anything."""
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        return replace(
            self,
            columns=[self.columns[place] for place in kept],
            rows=[[row[place] for place in kept] for row in self.rows],
        )


def seconds(nanoseconds: float) -> str:
    """Nanoseconds with the unit that suits them."""
    return format_seconds(nanoseconds * 1e-9)


def amount(value: float, unit: str) -> str:
    """A length of a trace: nanoseconds, or what its ``unit`` says that they are instead."""
    if not unit:
        return seconds(value)
    return format_quantity(value, {"bytes": "B", "none": ""}.get(unit, unit))


def percent(part: float, whole: float) -> str:
    """A part of a whole to the tenth of a percent: what is small is not 0, and what is not all is not 100."""
    if not whole:
        return NOTHING
    share = part / whole
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{format_quantity(share, '%')}" if share in (0, 1) else f"{100 * share:.1f} %"
