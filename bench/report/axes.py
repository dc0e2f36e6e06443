"""Axes for plots: scales with readable ticks, which values they can show, room for every point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.report.svg import GRID, SOFT
from bench.report.units import format_tick, text_of, unit_of_label

_HUGE = 1e250  # beyond this the ends of an axis would not be floats


def canvas(pixels: float, height: float) -> tuple[Any, Any]:
    """A figure of that many pixels and its axes. An inch is 72 SVG units, so a unit is a pixel."""
    from matplotlib.figure import Figure

    picture: Any = Figure(figsize=(pixels / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
    picture.get_layout_engine().set(w_pad=2 / 72, h_pad=3 / 72)
    return picture, picture.add_subplot()


def shown(value: float | None, log: bool) -> bool:
    """Whether an axis can show the value: a number, and above zero where it is logarithmic.

    At the ends of the range of floats there is no room for an axis; nothing measured is there.
    """
    if value is None or not -_HUGE < value < _HUGE:
        return False
    return value > 1 / _HUGE or not log


def limits(values: Iterable[float], log: bool, *, margin: float = 0.06) -> tuple[float, float]:
    """Lower and upper end of an axis: room around the values, and never an empty range.

    A logarithmic axis spans a factor of four at least, so that there are ticks on it.
    """
    finite = [float(value) for value in values if shown(value, log)]
    if not finite:
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = min(finite), max(finite)
    if log:
        span = max(math.log10(high / low), math.log10(4) - 1e-9)
        middle = (math.log10(low) + math.log10(high)) / 2
        half = span * (0.5 + margin)
        return 10 ** (middle - half), 10 ** (middle + half)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    span = (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - margin * span), high + margin * span


def scale(axis: Any, label: str, log: bool, ends: tuple[float, float], ticks: int) -> None:
    """Sets an axis' scale, its ends and its ticks, which are written with the label's unit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    unit = unit_of_label(label)
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_ends = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    if log:
        base = 2 if unit == "B" else 10
        set_scale("log", base=base)
        decades = math.log(ends[1] / ends[0], 10)
        subs = (1.0,) if base == 2 or decades >= 2.5 else (1.0, 3.0) if decades >= 1.3 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=ticks + 1))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10]))
    set_ends(*ends)
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value, unit)))
    axis.grid(True, color=GRID)
    axis.axes.set_axisbelow(True)
    axis.set_tick_params(length=0, pad=4)


def x_label(axes: Any, label: str, small: bool) -> None:
    axes.set_xlabel(text_of(label, 46 if small else 100), loc="right", color=SOFT)


def y_label(axes: Any, label: str, small: bool) -> None:
    """The name of the y axis lies flat above it: nobody turns a phone to read an axis."""
    axes.set_title(
        text_of(label, 46 if small else 100), loc="left", color=SOFT, fontsize=10.5 if small else 12
    )


def legend_columns(names: Sequence[str], pixels: float) -> int:
    """In how many columns a legend fits the width."""
    longest = max([1, *(len(name) for name in names)])
    widest = min(longest, pixels / 6.4) * 6.6 + 40
    return max(1, min(len(names), int(pixels / widest)))


def legend_height(names: Sequence[str], pixels: float) -> float:
    """Pixels a legend takes from the height of its figure."""
    return 17.0 * math.ceil(len(names) / legend_columns(names, pixels))


def legend(picture: Any, entries: Sequence[tuple[Any, str]], pixels: float) -> None:
    """A legend above the plot, in as many columns as fit."""
    if not entries:
        return
    # matplotlib leaves out what begins with an underscore; a hair space before it does not show.
    texts = [text_of(text or "unnamed", int(pixels / 6.4) - 6) for _, text in entries]
    texts = ["\u200a" + text if text.startswith("_") else text for text in texts]
    picture.legend(
        [handle for handle, _ in entries],
        texts,
        loc="outside upper left",
        ncols=legend_columns(texts, pixels),
        handlelength=1.8,
        handletextpad=0.6,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0.2,
    )


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
