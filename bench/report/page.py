"""Results -> one self-contained HTML page: no script, nothing from the network, every text escaped."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.report.draw import Comparison, ComparisonRow, Drawable, Drawing, draw, table
from bench.report.results import SIGNS, LabReport, PredictionResult, Report, VariantResult, read
from bench.report.units import (
    format_interval,
    format_number,
    format_quantity,
    format_ratio,
    format_seconds,
    format_value,
    text_of,
    unit_of,
)
from bench.whole_file import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

Named = TypeVar("Named", PredictionResult, VariantResult)

MOST_TABLE_ROWS = 300  # of one figure's table on the page; the results file has all


@dataclass(frozen=True)
class FigureView:
    """A figure as the page shows it: drawn for a desk and for a phone, and as a table."""

    title: str
    wide: Drawing
    narrow: Drawing
    header: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    left_out: int


def render_page(results: Mapping[str, Any]) -> str:
    """The page of a results file's parsed JSON; ValueError that names the field when it is no such file."""
    report = read(results)
    machine, reason = machine_figure(report)
    template = environment().get_template("page.html.j2")
    return template.render(
        report=report,
        machine_view=view(machine, "machine") if machine else None,
        no_machine_chart=reason,
        labs=[_lab_view(lab, f"lab{index}") for index, lab in enumerate(report.labs, 1)],
    )


def write_page(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the page in one step (never half a page) and returns where; ValueError when it cannot."""
    return write_text(render_page(results), path)


def write_text(page: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page's text in one step; ValueError when it cannot."""
    try:
        return write_whole(page, path)
    except OSError as error:
        raise ValueError(f"the page cannot be written to {path}: {error.strerror or error}") from error


def machine_figure(report: Report) -> tuple[Drawable | None, str]:
    """The machine's roofline from the roofline lab, or None and why there is none."""
    if report.machine.data is None:
        return None, "The file says nothing of the machine's limits, so its roofline cannot be drawn."
    try:
        from labs.machine import Machine
        from labs.roofline import machine_chart

        return machine_chart(Machine.from_json(report.machine.data)), ""
    except (ImportError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        # A sheet or a partial calibration lacks constants: the rest of the page is still right.
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return None, f"The machine's roofline cannot be drawn from its constants: {text_of(reason, 300)}."


def comparisons(lab: LabReport) -> list[Comparison]:
    """Predicted beside measured: one figure for each unit, times first; counted quantities are apart."""
    rows: dict[str, list[ComparisonRow]] = {}
    for item in lab.predictions:
        if item.exact:
            continue
        numbers = (item.predicted, item.measured, item.low, item.high)
        predicted, measured, low, high = (math.nan if value is None else value for value in numbers)
        rows.setdefault(unit_of(item.key), []).append(
            ComparisonRow(item.name, item.column, predicted, measured, low, high, item.verdict)
        )
    units = sorted(rows, key=lambda unit: (unit != "s", unit))
    names = {"s": "times", "B": "bytes", "x": "factors", "": "counts"}
    return [
        Comparison(f"Predicted beside measured {names.get(unit, unit)}", unit, rows[unit]) for unit in units
    ]


def view(figure: Drawable, name: str) -> FigureView:
    """Draws a figure twice and writes its table; ``name`` keeps its ids apart from all others."""
    header, rows = table(figure)
    unit = figure.unit if isinstance(figure, Comparison) else None
    cells = [[_cell(cell, unit) for cell in row] for row in rows[:MOST_TABLE_ROWS]]
    numeric = [bool(rows) and all(isinstance(row[i], float) for row in rows) for i in range(len(header))]
    return FigureView(
        title=figure.title,
        wide=draw(figure, f"{name}-wide", "wide"),
        narrow=draw(figure, f"{name}-narrow", "narrow"),
        header=header,
        rows=cells,
        numeric=numeric,
        left_out=max(0, len(rows) - MOST_TABLE_ROWS),
    )


def _cell(value: str | float, unit: str | None) -> str:
    if isinstance(value, str) or unit is None:
        return format_number(value)
    return format_quantity(value, unit)


def _lab_view(lab: LabReport, identity: str) -> dict[str, Any]:
    figures = [view(figure, f"{identity}-figure{index}") for index, figure in enumerate(lab.figures, 1)]
    compared = [
        view(figure, f"{identity}-compared{index}") for index, figure in enumerate(comparisons(lab), 1)
    ]
    return {
        "id": identity,
        "lab": lab,
        "columns": lab.columns,
        "compared": compared,
        "figures": figures,
        "off": [item for item in lab.predictions if item.verdict in ("off", "differs")],
        "failed_checks": [check for check in lab.checks if not check.passed],
    }


def split_links(text: str) -> list[tuple[str, bool]]:
    """Parts of a source's text and whether each is a web address. Only http and https become links."""
    parts = re.split(r"(https?://[^\s<>\"')\]]+)", text)
    return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def moment(text: str) -> str:
    """An ISO time to the minute, as a reader writes it; what is no such time stays as it is."""
    found = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z|[+-]\d\d:?\d\d)?$", text)
    if not found:
        return text
    zone = {None: "", "Z": " UTC", "+00:00": " UTC"}.get(found[3], f" {found[3]}")
    return f"{found[1]} {found[2]}{zone}"


def bounds(key: str, value: float | None, low: float | None, high: float | None) -> str:
    """The interval of ``format_interval`` alone, for the line below the value; "" without one."""
    return format_interval(key, value, low, high).removeprefix(format_value(key, value)).strip()


def by_name(rows: Iterable[Named]) -> list[tuple[str, list[Named]]]:
    """Rows of the same name together, in order of appearance."""
    named: dict[str, list[Named]] = {}
    for row in rows:
        named.setdefault(row.name, []).append(row)
    return list(named.items())


def percent(part: float | None) -> str:
    return format_quantity(part, "%")


@cache
def environment(*folders: Path) -> Environment:
    """Where pages come from: the parts and the style of this folder, and the templates of others.

    Every text is escaped; what a template lacks is an error, not an empty place.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        seconds=format_seconds,
        ratio=format_ratio,
        percent=percent,
        by_name=by_name,
        number=format_number,
        links=split_links,
        moment=moment,
        # Safe: to_svg keeps only known elements, and ElementTree has escaped every text in them.
        svg=lambda drawing: Markup(drawing.svg),
        sign=lambda verdict: SIGNS.get(verdict, "·"),
        word=lambda verdict: re.sub(r"[^a-z]", "-", verdict) if verdict in SIGNS else "other",
    )
    made.globals.update(format_value=format_value, format_interval=format_interval, bounds=bounds)
    return made
