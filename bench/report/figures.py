"""Figures out of a results file: what ``labs.figure.to_json`` wrote, with every type and length checked."""

from __future__ import annotations

from bench.report.fields import Field
from labs.figure import Bars, Chart, Figure, Series, Span, Timeline


def read_figure(item: Field) -> Figure:
    """A figure from ``labs.figure.to_json``'s dictionary, with null as NaN and every type checked."""
    title, note = item["title"].text("untitled"), item["note"].text()
    kind = item["kind"].text()
    if kind == "chart":
        return Chart(
            title=title,
            x_label=item["x_label"].text("x"),
            y_label=item["y_label"].text("y"),
            series=[_series(series) for series in item["series"].items()],
            x_log=item["x_log"].flag(),
            y_log=item["y_log"].flag(),
            note=note,
        )
    if kind == "bars":
        return _bars(item, title, note)
    if kind == "timeline":
        rows = []
        for row in item["rows"].items():
            parts = list(row.items())
            if len(parts) != 2:
                raise row.wrong("a worker's name and its list of spans")
            rows.append((parts[0].text(), [_span(span) for span in parts[1].items()]))
        return Timeline(title=title, rows=rows, x_label=item["x_label"].text("time (s)"), note=note)
    raise item["kind"].wrong("chart, bars or timeline")


def _series(item: Field) -> Series:
    x, y = item["x"].numbers(), item["y"].numbers()
    if len(x) != len(y):
        raise item.wrong(f"a series with as many y as x ({len(x)} x, {len(y)} y)")
    style = item["style"].text("points")
    if style not in ("points", "line", "dashed"):
        raise item["style"].wrong("points, line or dashed")
    labels, low, high = item["labels"].texts(), item["low"].numbers(), item["high"].numbers()
    for name, values in (("labels", labels), ("low", low), ("high", high)):
        if values and len(values) != len(x):
            raise item[name].wrong(f"empty or as long as x ({len(x)})")
    return Series(item["name"].text(), x, y, style, labels, low, high)  # type: ignore[arg-type]


def _bars(item: Field, title: str, note: str) -> Bars:
    labels = item["labels"].texts()
    series = {Field(name).text(): values.numbers() for name, values in item["series"].entries()}
    for name, values in item["series"].entries():
        if len(values.numbers()) != len(labels):
            raise item["series"][name].wrong(f"one value for each of the {len(labels)} labels")
    log, stacked = item["log"].flag(), item["stacked"].flag()
    if stacked and (log or any(value < 0 for values in series.values() for value in values)):
        raise item["stacked"].wrong("false for a logarithmic axis or negative values")
    return Bars(title, item["value_label"].text("value"), labels, series, log, note, stacked)


def _span(item: Field) -> Span:
    begin, end = item["begin"].number(), item["end"].number()
    if begin is None or end is None or end < begin:
        raise item.wrong("a span with numbers begin <= end")
    return Span(begin, end, item["label"].text())
