"""Figures made of rows: bars, who ran when, predicted beside measured. A row's name stands beside it on
a desk and above it on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.report.axes import canvas, legend, legend_height, limits, plural, scale, shown, x_label
from bench.report.draw import BAND, Comparison
from bench.report.plots import Plot, colours
from bench.report.svg import ALARM, GRID, INK, PAPER, SERIES, SOFT
from bench.report.units import format_quantity, format_ratio, format_tick, text_of, unit_of_label
from labs.figure import Bars, Span, Timeline

_MOST_ROWS = 60
_MOST_SPANS = 2000


def _row_names(axes: Any, names: Sequence[str], tops: Sequence[float], height: float, small: bool) -> None:
    """Names rows of a height whose upper ends are ``tops`` (y grows downwards, in pixels)."""
    axes.yaxis.set_tick_params(length=0, pad=6)
    if not small:
        axes.set_yticks([top + height / 2 for top in tops], [text_of(name, 40) for name in names], color=INK)
        return
    axes.set_yticks([])
    for name, top in zip(names, tops, strict=True):
        axes.text(
            0, top, text_of(name, 52), transform=axes.get_yaxis_transform(), ha="left", va="bottom", color=INK
        )


def bars(figure: Bars, pixels: float, small: bool) -> Plot:
    if figure.stacked:
        return _stacked_bars(figure, pixels, small)
    notes = [figure.note] if figure.note else []
    labels = list(figure.labels)[:_MOST_ROWS]
    if len(figure.labels) > len(labels):
        notes.append(f"The first {len(labels)} of {len(figure.labels):,} rows are drawn; the table has all.")
    thick, above = 13.0, (16.0 if small else 0.0)
    height = max(1, len(figure.series)) * thick
    pitch = above + height + 9
    picture, axes = canvas(pixels, len(labels) * pitch + 66 + legend_height(list(figure.series), pixels))
    values = [values[i] for values in figure.series.values() for i in range(len(labels))]
    ends = limits(values, figure.log)
    if not figure.log:  # a bar's length means something only from zero
        ends = (min(0.0, ends[0]), max(0.0, ends[1]))
    room = 0.16 if small else 0.1  # for the number behind the longest bar
    ends = (
        ends[0],
        ends[1] * (ends[1] / ends[0]) ** room if figure.log else ends[1] + room * (ends[1] - ends[0]),
    )
    scale(axes.xaxis, figure.value_label, figure.log, ends, 4 if small else 7)
    start = ends[0] if figure.log else 0.0
    unit = unit_of_label(figure.value_label)
    entries, dropped = [], 0
    for row, (name, column) in enumerate(figure.series.items()):
        paint = SERIES[row % len(SERIES)]
        for index in range(len(labels)):
            y = index * pitch + above + (row + 0.5) * thick
            value = column[index]
            if not shown(value, figure.log):
                dropped += value is not None and math.isfinite(value)
                axes.text(start, y, "\u00a0none", va="center", color=SOFT, fontsize=9)
                continue
            axes.barh(
                y,
                value - start,
                left=start,
                height=thick * 0.82,
                color=paint,
                edgecolor=PAPER,
                linewidth=0,
            )
            text = (
                format_quantity(value, unit)
                if unit in ("s", "B", "B/s", "FLOP/s")
                else format_tick(float(f"{value:.3g}"), unit)
            )
            axes.text(
                value if value >= 0 else 0,
                y,
                f"\u00a0{text}",
                va="center",
                color=SOFT,
                fontsize=9 if small else 10,
            )
        entries.append((_patch(paint), name))
    if dropped:
        notes.append(f"{plural(dropped, 'value')} not above zero: not drawn on the logarithmic axis.")
    tops = [index * pitch + above for index in range(len(labels))]
    _row_names(axes, labels, tops, height, small)
    axes.yaxis.grid(False)
    axes.set_ylim(max(1, len(labels)) * pitch - 4, -3)
    axes.spines["left"].set_visible(not figure.log and not small)
    axes.spines["bottom"].set_visible(False)
    x_label(axes, figure.value_label, small)
    if len(entries) > 1 or (entries and entries[0][1]):
        legend(picture, entries, pixels)
    return picture, notes, []


def _stacked_bars(figure: Bars, pixels: float, small: bool) -> Plot:
    """A bar per label whose parts are the series; behind it stands the sum."""
    notes = [figure.note] if figure.note else []
    labels = list(figure.labels)[:_MOST_ROWS]
    if len(figure.labels) > len(labels):
        notes.append(f"The first {len(labels)} of {len(figure.labels):,} rows are drawn; the table has all.")
    thick, above = 18.0, (16.0 if small else 0.0)
    pitch = above + thick + 9
    picture, axes = canvas(pixels, len(labels) * pitch + 66 + legend_height(list(figure.series), pixels))
    columns = [[v if shown(v, False) else 0.0 for v in values] for values in figure.series.values()]
    sums = [sum(column[index] for column in columns) for index in range(len(labels))]
    end = limits([0.0, *sums], False)[1]
    scale(axes.xaxis, figure.value_label, False, (0.0, end * (1.16 if small else 1.1)), 4 if small else 7)
    unit = unit_of_label(figure.value_label)
    for index, total in enumerate(sums):
        y, left = index * pitch + above + thick / 2, 0.0
        for row, column in enumerate(columns):
            paint = SERIES[row % len(SERIES)]
            axes.barh(y, column[index], left=left, height=thick, color=paint, edgecolor=PAPER, linewidth=0.8)
            left += column[index]
        text = format_tick(float(f"{total:.3g}"), unit)
        axes.text(total, y, f"\u00a0{text}", va="center", color=SOFT, fontsize=9 if small else 10)
    _row_names(axes, labels, [index * pitch + above for index in range(len(labels))], thick, small)
    axes.yaxis.grid(False)
    axes.set_ylim(max(1, len(labels)) * pitch - 4, -3)
    axes.spines["left"].set_visible(not small)
    axes.spines["bottom"].set_visible(False)
    x_label(axes, figure.value_label, small)
    legend(
        picture, [(_patch(SERIES[row % len(SERIES)]), name) for row, name in enumerate(figure.series)], pixels
    )
    return picture, notes, []


def _patch(colour: str, **options: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="none", **options)


def timeline(figure: Timeline, pixels: float, small: bool) -> Plot:
    notes = [figure.note] if figure.note else []
    rows = list(figure.rows)[:_MOST_ROWS]
    if len(figure.rows) > len(rows):
        notes.append(f"The first {len(rows)} of {len(figure.rows):,} workers are drawn; the table has all.")
    step = math.ceil(sum(len(spans) for _, spans in rows) / _MOST_SPANS) or 1
    if step > 1:
        notes.append(f"Every {step}th span of a worker is drawn; the table has all.")
    thick, above = 18.0, (16.0 if small else 0.0)
    pitch = above + thick + 7
    # Spans of a kind share a colour. With more kinds than colours the colour only tells neighbours apart.
    kinds = list(dict.fromkeys(span.label for _, spans in rows for span in spans))
    few = len(kinds) <= len(SERIES)
    numbers = dict(zip(kinds, colours(kinds) if few else range(len(kinds)), strict=True))
    picture, axes = canvas(pixels, len(rows) * pitch + 60 + (legend_height(kinds, pixels) if few else 0))
    drawn = [(index, spans[::step]) for index, (_, spans) in enumerate(rows)]
    times = [time for _, spans in drawn for span in spans for time in (span.begin, span.end)]
    low, high = (min(times), max(times)) if times else (0.0, 1.0)
    high = high if high > low else low + 1.0
    scale(axes.xaxis, figure.x_label, False, (min(0.0, low), high + 0.01 * (high - low)), 4 if small else 8)
    per_pixel = (high - min(0.0, low)) / (pixels * 0.8)
    for index, spans in drawn:
        bottom = index * pitch + above
        for span in spans:
            _span(axes, span, bottom, thick, SERIES[numbers[span.label] % len(SERIES)], per_pixel, few)
    tops = [index * pitch + above for index in range(len(rows))]
    _row_names(axes, [name for name, _ in rows], tops, thick, small)
    axes.yaxis.grid(False)
    axes.set_ylim(max(1, len(rows)) * pitch - 3, -3)
    axes.spines["left"].set_visible(False)
    x_label(axes, figure.x_label, small)
    if few and any(kinds):
        legend(picture, [(_patch(SERIES[numbers[kind] % len(SERIES)]), kind) for kind in kinds], pixels)
    return picture, notes, []


def _span(
    axes: Any, span: Span, bottom: float, thick: float, paint: str, per_pixel: float, few: bool
) -> None:
    wide = max(span.end - span.begin, 0.8 * per_pixel)  # a span shorter than a pixel still shows
    axes.barh(
        bottom + thick / 2,
        wide,
        left=span.begin,
        height=thick,
        color=paint,
        edgecolor=PAPER,
        linewidth=0.8 if wide > 4 * per_pixel else 0,
    )
    if not few and span.label and wide / per_pixel > 6.5 * len(span.label) + 4:
        axes.text(
            span.begin + wide / 2,
            bottom + thick / 2,
            text_of(span.label, 40),
            ha="center",
            va="center",
            color=PAPER,
            fontsize=9,
        )


def comparison(figure: Comparison, pixels: float, small: bool) -> Plot:
    from matplotlib.lines import Line2D

    notes = [figure.note] if figure.note else []
    names = list(dict.fromkeys(row.name for row in figure.rows))[:_MOST_ROWS]
    total = len({row.name for row in figure.rows})
    if total > len(names):
        notes.append(f"The first {len(names)} of {total:,} predictions are drawn; the table has all.")
    columns = [name for name in dict.fromkeys(row.column for row in figure.rows) if name]
    lane, above = 15.0, (15.0 if small else 0.0)
    most = max([1, *(sum(row.name == name for row in figure.rows) for name in names)])
    pitch = above + most * lane + 6
    picture, axes = canvas(pixels, max(1, len(names)) * pitch + 96 + (14 if small else 0))
    ends = limits(
        [
            value * factor
            for row in figure.rows
            for value in (row.predicted, row.measured, row.low, row.high)
            for factor in (1 / BAND, BAND)
        ],
        True,
        margin=0.02,
    )
    label = f"{'time' if figure.unit == 's' else 'value'} ({figure.unit})" if figure.unit else "value"
    scale(axes.xaxis, label, True, ends, 4 if small else 7)
    lanes, unmeasured, undrawn = dict.fromkeys(names, 0), 0, 0
    for row in figure.rows:
        if row.name not in lanes:
            continue
        # What belongs to no column (a crossover) is grey, beside columns.
        colour = columns.index(row.column) if row.column else 0 if len(columns) < 2 else -1
        paint = SERIES[colour % len(SERIES)]
        y = names.index(row.name) * pitch + above + (lanes[row.name] + 0.5) * lane
        lanes[row.name] += 1
        if shown(row.predicted, True):
            axes.barh(
                y,
                row.predicted * BAND - row.predicted / BAND,
                left=row.predicted / BAND,
                height=lane * 0.72,
                color=paint,
                alpha=0.2,
                linewidth=0,
            )
            axes.plot(row.predicted, y, "o", mfc=PAPER, mec=paint, mew=1.6, ms=8)
        if shown(row.measured, True):
            if shown(row.low, True) and shown(row.high, True):
                axes.plot([row.low, row.high], [y, y], color=paint, lw=2.2, solid_capstyle="butt")
            axes.plot(row.measured, y, "o", mfc=paint, mec=PAPER, mew=0.5, ms=6.5)
        elif math.isfinite(row.measured):
            undrawn += 1
        else:
            unmeasured += 1
        undrawn += math.isfinite(row.predicted) and row.predicted <= 0
        off = row.verdict == "off"
        ratio = row.measured / row.predicted if row.predicted else math.nan
        text = format_ratio(ratio) + (" off" if off else "") if math.isfinite(ratio) else ""
        axes.text(
            1.005,
            y,
            text,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9 if small else 10.5,
            color=ALARM if off else SOFT,
            fontweight="bold" if off else "normal",
        )
    if unmeasured:
        notes.append(f"{plural(unmeasured, 'prediction')} not measured.")
    if undrawn:
        notes.append(f"{plural(undrawn, 'value')} not above zero: not drawn on the logarithmic axis.")
    tops = [index * pitch + above for index in range(len(names))]
    _row_names(axes, names, tops, most * lane, small)
    for top in tops[1:]:
        axes.axhline(top - above - 3, color=GRID, lw=0.8)
    axes.yaxis.grid(False)
    axes.set_ylim(max(1, len(names)) * pitch - 3, -3)
    axes.spines["left"].set_visible(False)
    x_label(axes, label, small)
    first = SERIES[0] if len(columns) <= 1 else SOFT
    entries = [
        (Line2D([], [], ls="none", marker="o", ms=8, mfc=PAPER, mec=first, mew=1.6), "predicted"),
        (_patch(first, alpha=0.2), "within a factor of 1.41"),
        (Line2D([], [], marker="o", ms=6.5, color=first, lw=2.2), "measured, 95 % interval"),
    ]
    if len(columns) > 1:
        entries += [(_patch(SERIES[i % len(SERIES)]), f"{name} allocator") for i, name in enumerate(columns)]
    legend(picture, entries, pixels)
    return picture, notes, []
