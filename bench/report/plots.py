"""One function per kind of figure: a matplotlib figure, notes on what it leaves out, a key to numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from bench.report.axes import canvas, legend, legend_height, limits, plural, scale, shown, x_label, y_label
from bench.report.labels import Box, Place, place
from bench.report.svg import INK, PAPER, SERIES, SOFT, settle
from bench.report.units import text_of
from labs.figure import Chart, Series

Plot = tuple[Any, list[str], list[str]]

_MARKERS = "os^DvPX"
_MOST_POINTS = 300  # of a series, drawn: more stand closer than a pixel apart
_MOST_WORDS = 30  # labels beside points; more are numbered


def subject(name: str) -> str:
    """A series' name without "predicted" or "measured": what both are about shares a colour."""
    return re.sub(
        r"\W+", " ", re.sub(r"\b(predicted|prediction|measured|measurement)\b", "", name.lower())
    ).strip()


def colours(names: Sequence[str]) -> list[int]:
    """A colour's number for each name; the same for a prediction and its measurement."""
    known: dict[str, int] = {}
    chosen = []
    for index, name in enumerate(names):
        chosen.append(known.setdefault(subject(name) or f"{index}", len(known)))
    return chosen


def thin(series: Series, kept: list[int], notes: list[str]) -> list[int]:
    """Every n-th point where there are too many to be told apart, said in a note."""
    step = math.ceil(len(kept) / _MOST_POINTS)
    if step <= 1:
        return kept
    name = text_of(series.name, 40)
    notes.append(f"{name}: one of every {step} of {len(kept):,} points is drawn; the table has all.")
    return kept[::step]


def chart(figure: Chart, pixels: float, small: bool) -> Plot:
    notes = [figure.note] if figure.note else []
    names = [series.name for series in figure.series]
    picture, axes = canvas(pixels, (270 if small else 380) + legend_height(names, pixels))
    kept_of = []
    for series in figure.series:
        kept = [
            i
            for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
            if shown(x, figure.x_log) and shown(y, figure.y_log)
        ]
        if len(kept) < len(series.x):
            why = "no number, or not above zero on a logarithmic axis"
            missing = plural(len(series.x) - len(kept), "point")
            notes.append(f"{text_of(series.name, 40)}: {missing} not drawn ({why}).")
        kept_of.append(thin(series, kept, notes))
    pairs = list(zip(figure.series, kept_of, strict=True))
    xs = [series.x[i] for series, kept in pairs for i in kept]
    ys = [series.y[i] for series, kept in pairs for i in kept]
    for series, kept in pairs:
        ys += [bound[i] for bound in (series.low, series.high) if bound for i in kept]
    scale(axes.xaxis, figure.x_label, figure.x_log, limits(xs, figure.x_log), 4 if small else 8)
    scale(axes.yaxis, figure.y_label, figure.y_log, limits(ys, figure.y_log), 6)
    x_label(axes, figure.x_label, small)
    y_label(axes, figure.y_label, small)
    entries = []
    for (series, kept), colour in zip(pairs, colours(names), strict=True):
        entries.append((_series(axes, series, kept, colour, figure.y_log), series.name))
    if not xs:
        axes.text(0.5, 0.5, "no points to draw", transform=axes.transAxes, ha="center", color=SOFT)
    if len(entries) > 1 or (entries and figure.series[0].name):
        legend(picture, entries, pixels)
    key = _label_points(picture, axes, pairs, small)
    return picture, notes, key


def _series(axes: Any, series: Series, kept: list[int], colour: int, y_log: bool) -> Any:
    paint, marker = SERIES[colour % len(SERIES)], _MARKERS[colour % len(_MARKERS)]
    xs, ys = [series.x[i] for i in kept], [series.y[i] for i in kept]
    if series.low and series.high:
        for i in kept:
            if shown(series.low[i], y_log) and shown(series.high[i], y_log):
                axes.plot([series.x[i]] * 2, [series.low[i], series.high[i]], color=paint, lw=1.4, alpha=0.55)
    if series.style == "dashed":
        # Dashes begin elsewhere for each colour: of two limits that coincide, both are seen.
        pattern = (2.2 * colour, (4, 2.5))
        (line,) = axes.plot(xs, ys, color=paint, lw=1.8, ls=pattern, dash_capstyle="butt")
        if len(xs) == 1:
            axes.plot(xs, ys, marker=marker, color=paint, mfc="none", ls="none", ms=6)
        return line
    dense, bare = len(kept) > 40, series.style == "line" and len(kept) > 12
    (line,) = axes.plot(
        xs,
        ys,
        color=paint,
        lw=2 if series.style == "line" else 0,
        ls="-" if series.style == "line" else "none",
        marker="" if bare else marker,
        ms=5 if dense else 8 if series.style == "points" else 6,
        mec=PAPER,
        mew=0.8,
    )
    return line


def _label_points(picture: Any, axes: Any, pairs: list[tuple[Series, list[int]]], small: bool) -> list[str]:
    """Writes each labelled point's word beside it, or a number where the words do not fit."""
    points = [
        (series.x[i], series.y[i], series.labels[i]) for series, kept in pairs if series.labels for i in kept
    ]
    points = [point for point in points if point[2]]
    if not points:
        return []
    # Pixels are only known once the legend and the tick labels have taken their room.
    settle(picture)
    size = 9.5 if small else 10.5
    frame = axes.get_window_extent()
    area = Box(frame.x0, frame.y0, frame.x1 + 4, frame.y1 + 4)
    at = [tuple(axes.transData.transform(point[:2])) for point in points]
    markers, lines = _obstacles(axes, pairs)
    texts = [text_of(point[2], 40) for point in points]
    key: list[str] = []
    # Place small ones greedily when there are few of them; too many points hide each other anyway.
    places = place(at, texts, size, area, markers, lines) if len(texts) <= _MOST_WORDS else []
    if not places or not all(spot.clear for spot in places):
        key = [point[2] for point in points]
        texts = [str(number) for number in range(1, len(points) + 1)]
        places = place(at, texts, size, area, markers, lines)
    for (x, y), text, spot in zip(at, texts, places, strict=True):
        _write(axes, x, y, text, spot, size)
    return key


def _obstacles(axes: Any, pairs: list[tuple[Series, list[int]]]) -> tuple[list[Box], list[Box]]:
    markers, lines = [], []
    for series, kept in pairs:
        spots = [axes.transData.transform((series.x[i], series.y[i])) for i in kept]
        if series.style == "points":
            markers += [Box(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
            continue
        for (x0, y0), (x1, y1) in itertools.pairwise(spots):
            steps = max(1, min(200, int(math.hypot(x1 - x0, y1 - y0) / 5)))
            for step in range(steps + 1):
                x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
                lines.append(Box(x - 1.5, y - 1.5, x + 1.5, y + 1.5))
    return markers, lines


def _write(axes: Any, x: float, y: float, text: str, spot: Place, size: float) -> None:
    """Writes at the place's box (display pixels are pixels of the drawing: 72 dots an inch)."""
    box = spot.box
    line = dict(arrowstyle="-", color=SOFT, lw=0.6, shrinkA=0, shrinkB=3) if spot.distance > 10 else None
    on_left = box.right <= x
    anchor = box.right if on_left else box.left
    if abs((box.left + box.right) / 2 - x) < 1:
        on_left, anchor = False, box.left
    middle = (box.bottom + box.top) / 2
    axes.annotate(
        text,
        xy=(x, y),
        xycoords="figure pixels",
        xytext=(anchor, middle),
        textcoords="figure pixels",
        ha="right" if on_left else "left",
        va="center",
        fontsize=size,
        color=INK,
        arrowprops=line,
        annotation_clip=False,
    )
