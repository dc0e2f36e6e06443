"""Figures as data -> inline SVG and a table that says the same.

``draw`` draws a figure at one of two widths, because a drawing for a desk shrunk to a phone cannot be
read. What a drawing leaves out (a zero on a logarithmic axis, points that stand too close together to
be told apart) is counted in its notes; ``table`` always has everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.report.units import text_of
from labs.figure import Bars, Chart, Figure, Timeline

Width = Literal["wide", "narrow"]
PIXELS = {"wide": 720, "narrow": 330}
BAND = math.sqrt(2)  # a prediction within this factor is confirmed

Cell = str | float


@dataclass(frozen=True)
class ComparisonRow:
    """One prediction beside its measurement; NaN where there is none. ``verdict`` goes to the margin."""

    name: str
    column: str
    predicted: float
    measured: float
    low: float
    high: float
    verdict: str = ""


@dataclass(frozen=True)
class Comparison:
    """Predicted beside measured on a common logarithmic axis. All values have one ``unit``."""

    title: str
    unit: str
    rows: Sequence[ComparisonRow]
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """An ``<svg>`` element, what it leaves out, and the words for the numbers in it (mostly none)."""

    svg: str
    notes: tuple[str, ...]
    key: tuple[str, ...] = ()


Drawable = Figure | Comparison


def draw(figure: Drawable, name: str, width: Width = "wide") -> Drawing:
    """Draws a figure. ``name`` begins all ids of the SVG: give every drawing of a page another one.

    name: letters, digits and dashes; ValueError otherwise.
    """
    if not name or not all(letter.isascii() and (letter.isalnum() or letter == "-") for letter in name):
        raise ValueError(f"a drawing's name is letters, digits and dashes, not {name!r}")
    import matplotlib

    from bench.report import plots, rows
    from bench.report.svg import RC, to_svg

    kinds: dict[type, Callable[[Any, float, bool], plots.Plot]] = {
        Chart: plots.chart,
        Bars: rows.bars,
        Timeline: rows.timeline,
        Comparison: rows.comparison,
    }
    if type(figure) not in kinds:
        raise TypeError(f"a figure is a Chart, Bars, Timeline or Comparison, not {type(figure).__name__}")
    small = width == "narrow"
    with matplotlib.rc_context({**RC, "font.size": 10.5 if small else 12}), warnings.catch_warnings():
        # A letter that matplotlib's font lacks is drawn by the browser's all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        picture, notes, key = kinds[type(figure)](figure, PIXELS[width], small)
        svg = to_svg(picture, name, text_of(figure.title, 300))
    return Drawing(svg, tuple(note for note in notes if note), tuple(key))


def table(figure: Drawable) -> tuple[list[str], list[list[Cell]]]:
    """The figure's text equivalent: a header and one row per point, bar label, span or prediction.

    Numbers stay numbers (NaN: there is none); the header names the unit as the axis does.
    """
    if isinstance(figure, Chart):
        return _chart_table(figure)
    if isinstance(figure, Bars):
        # The unit of the values belongs to every column but the first.
        header = [_values_header(name, figure.value_label) for name in figure.series]
        columns = list(figure.series.values())
        return (
            ["", *header],
            [[label, *(_float(column[i]) for column in columns)] for i, label in enumerate(figure.labels)],
        )
    if isinstance(figure, Timeline):
        rows: list[list[Cell]] = [
            [worker, span.label, float(span.begin), float(span.end)]
            for worker, spans in figure.rows
            for span in spans
        ]
        unit = figure.x_label[figure.x_label.rindex("(") :] if "(" in figure.x_label else ""
        return ["worker", "what", f"begin {unit}".strip(), f"end {unit}".strip()], rows
    if isinstance(figure, Comparison):
        unit = f" ({figure.unit})" if figure.unit else ""
        names = ("predicted", "measured", "low", "high")
        return (
            ["prediction", "allocator", *(name + unit for name in names), "verdict"],
            [
                [row.name, row.column, row.predicted, row.measured, row.low, row.high, row.verdict]
                for row in figure.rows
            ],
        )
    raise TypeError(f"a figure is a Chart, Bars, Timeline or Comparison, not {type(figure).__name__}")


def _values_header(series: str, value_label: str) -> str:
    return f"{series}: {value_label}" if series else value_label


def _chart_table(figure: Chart) -> tuple[list[str], list[list[Cell]]]:
    with_labels = any(series.labels for series in figure.series)
    with_interval = any(series.low and series.high for series in figure.series)
    header = ["series"]
    if with_labels:
        header.append("point")
    header += [figure.x_label, figure.y_label]
    if with_interval:
        header += ["low", "high"]
    rows = []
    for series in figure.series:
        for index in range(len(series.x)):
            row: list[Cell] = [series.name]
            if with_labels:
                row.append(series.labels[index] if series.labels else "")
            row += [_float(series.x[index]), _float(series.y[index])]
            if with_interval:
                interval = (series.low, series.high) if series.low and series.high else ((), ())
                row += [_float(bound[index]) if bound else math.nan for bound in interval]
            rows.append(row)
    return header, rows


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
