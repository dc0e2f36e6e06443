"""A lab's picture as data: what to draw, not how. ``bench/report`` draws it and writes its table.

Every figure carries all its numbers, so the text equivalent (a table) always says the same.
All of it is plain JSON: a report is drawn from a results file alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from labs.lab import Results

NAN = float("nan")


@dataclass(frozen=True)
class Series:
    """Points in the plane.

    style: ``points`` (markers), ``line``, ``dashed`` (a prediction or a limit). By convention what was
    predicted is dashed and what was measured is points or a line.
    labels: a word per point, or empty. low, high: the interval of each y, or empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["points", "line", "dashed"] = "points"
    labels: Sequence[str] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Series over common axes. Labels of axes end with the unit in brackets: ``time (s)``."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: a row per label, a bar per series (name -> one value a label, NaN: none).

    stacked: one bar per label, whose parts are the series one behind the other; values are not negative and
    the axis is not logarithmic.
    """

    title: str
    value_label: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    log: bool = False
    note: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Span:
    begin: float
    end: float
    label: str = ""


@dataclass(frozen=True)
class Timeline:
    """Who ran when: a row per worker, its spans in seconds from the start."""

    title: str
    rows: Sequence[tuple[str, Sequence[Span]]]
    x_label: str = "time (s)"
    note: str = ""


def measured_and_predicted(
    results: Results, addresses: Sequence[str], title: str, log: bool = False, note: str = ""
) -> Bars | None:
    """Time of each variant that was measured beside its prediction, called by its name, or where there are
    several groups by its address; None where none was measured."""
    found = [address for address in addresses if results.has(address)]
    if not found:
        return None
    groups = {address.partition("/")[0] for address in found}
    names = [address.partition("/")[2] for address in found] if len(groups) == 1 else found
    times = {
        "measured": [results.seconds(address).value for address in found],
        "predicted": [results.predicted(address) or NAN for address in found],
    }
    return Bars(title, "time (s)", names, times, log=log, note=note)


Figure = Chart | Bars | Timeline
_KINDS: dict[str, Any] = {"chart": Chart, "bars": Bars, "timeline": Timeline}


def to_json(figure: Figure) -> dict[str, Any]:
    return {"kind": type(figure).__name__.lower(), **asdict(figure)}


def from_json(data: Mapping[str, Any]) -> Figure:
    """The figure back from ``to_json``'s dictionary; ValueError or TypeError when it is no figure."""
    content = dict(data)
    kind = content.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of figure {kind!r}")
    if kind == "chart":
        content["series"] = [Series(**series) for series in content["series"]]
    if kind == "timeline":
        content["rows"] = [(row, [Span(**span) for span in spans]) for row, spans in content["rows"]]
    return _KINDS[kind](**content)
