"""Drawings: every number of a figure is in its table, nothing is left out silently, no two clash."""

from __future__ import annotations

import math
import re
import runpy
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.report import Comparison, ComparisonRow, Drawing, draw, table
from bench.report.fields import Field
from bench.report.figures import read_figure
from bench.report.labels import Box, place
from bench.report.plots import colours
from labs.figure import Bars, Chart, Series, Span, Timeline, to_json

example = runpy.run_path(str(Path(__file__).with_name("report_example.py")))
FIGURES = [figure for figures in example["figures"]().values() for figure in figures]
WIDTHS = ("wide", "narrow")


def words(drawing: Drawing) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing.svg).iter() if element.text]


def marks(drawing: Drawing) -> int:
    """Markers drawn (each is a use of its shape)."""
    return sum(element.tag.endswith("use") for element in ElementTree.fromstring(drawing.svg).iter())


def comparison(count: int = 3) -> Comparison:
    rows = [
        ComparisonRow(f"group/way{i}", "default", 1e-3 * 2**i, 1.2e-3 * 2**i, 1.1e-3 * 2**i, 1.3e-3 * 2**i)
        for i in range(count)
    ]
    return Comparison("Predicted beside measured", "s", rows)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("figure", [*FIGURES, comparison()], ids=lambda figure: figure.title[:20])
def test_a_drawing_is_one_safe_svg_element(figure: Any, width: Any) -> None:
    drawing = draw(figure, "name", width)
    root = ElementTree.fromstring(drawing.svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") == figure.title
    kept = {"svg", "g", "defs", "clipPath", "path", "rect", "use", "text"}
    assert {element.tag.split("}")[1] for element in root.iter()} <= kept
    assert all(not key.startswith("on") for element in root.iter() for key in element.attrib)
    assert all(element.get("href", "#").startswith("#") for element in root.iter())
    assert not re.search(r"(fill|stroke): ?#", drawing.svg)  # every colour follows light and dark


def test_ids_begin_with_the_name_and_all_references_resolve() -> None:
    seen: set[str] = set()
    for number, figure in enumerate(FIGURES):
        root = ElementTree.fromstring(draw(figure, f"figure{number}").svg)
        ids = {element.get("id", "") for element in root.iter()} - {""}
        assert all(identity.startswith(f"figure{number}-") for identity in ids)
        assert not ids & seen
        seen |= ids
        used = {
            value
            for element in root.iter()
            for key in element.attrib.values()
            for value in re.findall(r"url\(#(.+?)\)", key)
        }
        used |= {element.get("href", "")[1:] for element in root.iter()} - {""}
        assert used == ids
    assert seen


@pytest.mark.proof
def test_a_drawing_is_the_same_every_time() -> None:
    for figure in FIGURES:
        assert draw(figure, "a") == draw(figure, "a")


@pytest.mark.parametrize("name", ["", "a b", 'x"onload=', "ü"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and dashes"):
        draw(comparison(), name)


def test_something_that_is_no_figure_is_refused() -> None:
    for function in (table, lambda figure: draw(figure, "name")):
        with pytest.raises(TypeError, match="Chart, Bars, Timeline or Comparison"):
            function("a chart")


# --- the table -----------------------------------------------------------------------------------


def test_a_charts_table_has_every_point() -> None:
    for figure in FIGURES:
        if isinstance(figure, Chart):
            header, rows = table(figure)
            x, y = header.index(figure.x_label), header.index(figure.y_label)
            expected = [(s.name, a, b) for s in figure.series for a, b in zip(s.x, s.y, strict=True)]
            assert [(row[0], row[x], row[y]) for row in rows] == expected
            labels = [label for s in figure.series for label in (s.labels or [""] * len(s.x))]
            assert not any(labels) or [row[header.index("point")] for row in rows] == labels


def test_a_charts_table_has_the_intervals() -> None:
    figure = Chart("t", "x", "y", [Series("a", [1], [2], low=[1.5], high=[2.5]), Series("b", [3], [4])])
    header, rows = table(figure)
    assert header[-2:] == ["low", "high"]
    assert rows[0][-2:] == [1.5, 2.5]
    assert all(math.isnan(value) for value in rows[1][-2:])  # type: ignore[arg-type]


def test_the_other_tables_have_every_number() -> None:
    bars = Bars("t", "speed-up (x)", ["a", "b"], {"one": [1.0, math.nan], "two": [3.0, 4.0]})
    header, rows = table(bars)
    assert header == ["", "one: speed-up (x)", "two: speed-up (x)"]
    assert rows[0] == ["a", 1.0, 3.0]
    assert rows[1][0] == "b"
    assert math.isnan(rows[1][1])  # type: ignore[arg-type]
    spans = Timeline("t", [("w", [Span(0.0, 1.0, "x"), Span(1.0, 3.0, "y")])])
    assert table(spans) == (
        ["worker", "what", "begin (s)", "end (s)"],
        [["w", "x", 0.0, 1.0], ["w", "y", 1.0, 3.0]],
    )
    assert table(comparison(1))[1] == [["group/way0", "default", 1e-3, 1.2e-3, 1.1e-3, 1.3e-3, ""]]


def test_stacked_bars_stand_behind_one_another_and_show_their_sum() -> None:
    series = {"one": [1.0, 2.0], "two": [3.0, math.nan]}
    stacked = draw(Bars("t", "v", ["a", "b"], series, stacked=True), "a").svg
    assert ">\u00a04<" in stacked
    assert ">\u00a02<" in stacked
    beside = draw(Bars("t", "v", ["a", "b"], series), "a").svg
    assert ">\u00a04<" not in beside
    figure = Bars("t", "v", ["a"], {"s": [1.0]}, stacked=True)
    assert read_figure(Field(to_json(figure))) == figure
    for wrong in ({"log": True}, {"series": {"s": [-1.0]}}):
        with pytest.raises(ValueError, match="stacked"):
            read_figure(Field({**to_json(figure), **wrong}))


# --- what cannot be drawn ------------------------------------------------------------------------


def test_what_a_logarithmic_axis_cannot_show_is_counted() -> None:
    values = [0.0, -1.0, math.nan, math.inf, 1.0, 10.0]
    figure = Chart("t", "x", "y (s)", [Series("times", [1, 2, 3, 4, 5, 6], values)], False, True)
    drawing = draw(figure, "a")
    assert [note for note in drawing.notes if "times: 4 points not drawn" in note]
    assert len(table(figure)[1]) == 6
    complete = Chart("t", "x", "y (s)", [Series("times", [5, 6], [1.0, 10.0])], False, True)
    assert draw(complete, "a").notes == ()
    assert marks(drawing) == marks(draw(complete, "a"))
    bars = Bars("t", "v", ["a", "b", "c"], {"s": [0.0, 2.0, math.nan]}, log=True)
    assert [note for note in draw(bars, "a").notes if "1 value not above zero" in note]


def test_a_prediction_without_measurement_is_counted() -> None:
    rows = [
        ComparisonRow("a", "", 1.0, math.nan, math.nan, math.nan),
        ComparisonRow("b", "", 1.0, 0.0, 0.0, 0.0),
    ]
    notes = draw(Comparison("t", "s", rows), "a").notes
    assert "1 prediction not measured." in notes
    assert "1 value not above zero: not drawn on the logarithmic axis." in notes


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "figure",
    [
        Chart("t", "x", "y", []),
        Chart("t", "x", "y", [Series("", [], [])], True, True),
        Chart("t", "x", "y", [Series("one", [1.0], [1.0], "line")], True, True),
        Chart("t", "x", "y", [Series("flat", [1.0, 2.0], [0.0, 0.0], "dashed")]),
        Chart("t", "x", "y", [Series("huge", [1e-300, 1e300], [1e-300, 1e300])], True, True),
        Chart("t", "x", "y", [Series("huge", [-1e300, 1e300], [-1e300, 1e300])]),
        Chart("t", "x", "y", [Series("none", [math.nan], [math.nan])]),
        Bars("t", "v", [], {}),
        Bars("t", "v", ["a"], {"s": [math.nan]}, log=True),
        Bars("t", "v", ["a"], {"s": [-3.0], "u": [0.0]}),
        Bars("t", "v", [], {}, stacked=True),
        Bars("t", "v", ["a"], {"s": [math.nan], "u": [0.0]}, stacked=True),
        Timeline("t", []),
        Timeline("t", [("w", [])]),
        Timeline("t", [("w", [Span(1.0, 1.0)])]),
        Comparison("t", "s", []),
        Comparison("t", "", [ComparisonRow("a", "c", math.nan, math.nan, math.nan, math.nan)]),
    ],
)
def test_empty_and_extreme_figures_are_drawn_without_a_warning(figure: Any, width: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(figure, "a", width).svg.startswith("<svg")


def test_many_points_are_thinned_and_it_is_said() -> None:
    xs = [float(i) for i in range(1, 1001)]
    drawing = draw(Chart("t", "x", "y", [Series("many", xs, xs)]), "a")
    assert "many: one of every 4 of 1,000 points is drawn; the table has all." in drawing.notes
    assert 250 <= marks(drawing) <= 300  # ticks have no marks, the legend has one


def test_a_prediction_shares_its_measurements_colour() -> None:
    assert colours(
        ["threads predicted", "threads measured", "processes (measured)", "Predicted processes"]
    ) == [0, 0, 1, 1]
    assert colours(["measured", "predicted"]) == [0, 1]  # nothing is left that they could share


# --- text ----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{$",
    "_hidden",
    "a" * 10_000,
    "\x00\x1b[31m",
    'x & y "z" \'',
    "日本語",
    "]]>",
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_only_text(text: str, width: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            Chart(
                text, f"{text} (s)", text, [Series(text, [1, 2], [1, 2], "points", [text, text])], note=text
            ),
            Bars(text, text, [text], {text: [1.0]}),
            Timeline(text, [(text, [Span(0, 1, text)])]),
            Comparison(text, "s", [ComparisonRow(text, text, 1.0, 2.0, 1.5, 2.5, text)]),
        ):
            drawing = draw(figure, "a", width)
            ElementTree.fromstring(drawing.svg)
            assert "<script" not in drawing.svg
            assert len(drawing.svg) < 100_000


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=30))
def test_a_series_name_is_drawn_as_it_is(name: str) -> None:
    shown = words(draw(Chart("t", "x", "y", [Series(name, [1], [1]), Series("b", [2], [2])]), "a"))
    printable = "".join(
        " " if letter.isspace() else letter if letter.isprintable() else "\ufffd" for letter in name
    )
    expected = printable or "unnamed"
    assert any(word.lstrip("\u200a").split() == expected.split() for word in shown)


# --- labels --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(50, 550), st.floats(50, 350)), min_size=1, max_size=12))
def test_clear_labels_cover_nothing(points: list[tuple[float, float]]) -> None:
    obstacles = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    area = Box(0, 0, 600, 400)
    places = place(points, ["label"] * len(points), 10, area, obstacles, [])
    for index, spot in enumerate(places):
        if spot.clear:
            assert spot.box.inside(area)
            assert not any(spot.box.overlaps(other) for other in obstacles)
        others = [other.box for other in places[:index] + places[index + 1 :] if other.clear]
        assert not (spot.clear and any(spot.box.overlaps(other) for other in others))


def test_labels_that_do_not_fit_become_numbers_with_a_key() -> None:
    names = [f"a rather long name {i}" for i in range(25)]
    crowd = Series(
        "crowd", [1 + i / 1000 for i in range(25)], [1 + i / 1000 for i in range(25)], "points", names
    )
    drawing = draw(Chart("t", "x", "y", [crowd, Series("far", [100], [100])]), "a", "narrow")
    assert list(drawing.key) == names
    assert {"1", "25"} <= set(words(drawing))
    few = Series("few", [1, 50], [1, 50], "points", ["low", "high"])
    drawing = draw(Chart("t", "x", "y", [few]), "a", "narrow")
    assert drawing.key == ()
    assert {"low", "high"} <= set(words(drawing))
