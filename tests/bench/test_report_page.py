"""The page, in a real browser where there is one: opens offline, shows everything, runs nothing."""

from __future__ import annotations

import copy
import json
import math
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import DESK, PHONE, contrast, opened, sticking_out
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.report import render_page, write_page
from bench.report.page import moment, split_links, view
from labs.figure import Bars, Chart, Series, to_json

_module = runpy.run_path(str(Path(__file__).with_name("report_example.py")))
example, plain = _module["example"], _module["plain"]


class Words(HTMLParser):
    """The text of a page, its tags and its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Through JSON, as it comes from a file.
    results = json.loads(json.dumps(example()))
    return write_page(results, tmp_path_factory.mktemp("report") / "page.html")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_card_and_every_figure_is_there(browser: Any, page_path: Path, size: dict[str, Any]) -> None:
    tab, wrong = opened(browser, page_path, **size)
    assert wrong == []
    labs = example()["perflab"]["labs"]
    assert tab.locator("section.lab").evaluate_all("all => all.map(one => one.dataset.lab)") == list(labs)
    for name, lab in labs.items():
        card = tab.locator(f"section.lab[data-lab={name}]")
        assert card.locator("h2").inner_text() == lab["question"]
        assert lab["answer"] in card.inner_text()
        assert card.locator(".claims > li").count() == 3
        figures = card.locator("figure")
        assert figures.count() == len(lab["figures"]) + 1  # and predicted beside measured
        for figure in lab["figures"]:
            assert card.locator("figcaption", has_text=figure["title"]).count() == 1
        for index in range(figures.count()):
            boxes = (
                figures.nth(index)
                .locator("svg")
                .evaluate_all(
                    "all => all.map(one => one.getBoundingClientRect()).filter(box => box.width > 0)"
                )
            )
            assert len(boxes) == 1  # the drawing for this width; the other one is not displayed
            assert boxes[0]["width"] > 250
            assert boxes[0]["height"] > 80
    names = tab.locator("svg").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert all(names)
    tab.close()


def test_a_drawing_has_ink_in_it(browser: Any, page_path: Path) -> None:
    tab, _ = opened(browser, page_path, **DESK)
    drawn = tab.locator("figure .wide svg").evaluate_all(
        "all => all.map(svg => [...svg.querySelectorAll('path, use')]"
        ".filter(mark => mark.getBoundingClientRect().width > 0).length)"
    )
    # The simplest figure of all is two bars on an axis.
    assert len(drawn) >= 9
    assert min(drawn) >= 3
    tab.close()


@pytest.mark.parametrize(
    "width", [360, *(pytest.param(width, marks=pytest.mark.proof) for width in (320, 720, 721, 1000))]
)
def test_the_page_itself_never_scrolls_sideways(browser: Any, page_path: Path, width: int) -> None:
    tab, _ = opened(browser, page_path, viewport={"width": width, "height": 740})
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out of a container that cannot be scrolled.
    assert sticking_out(tab, width) == []
    tab.close()


@pytest.mark.proof
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_drawings_follow_the_colour_scheme(browser: Any, page_path: Path, scheme: Any) -> None:
    tab, wrong = opened(browser, page_path, color_scheme=scheme, **DESK)
    assert wrong == []
    style = "one => getComputedStyle(one)"
    paper = tab.locator("section.card").first.evaluate(f"{style.replace('one)', 'one).backgroundColor', 1)}")
    assert (contrast(paper, "rgb(0,0,0)") > 10) == (scheme == "light")
    for selector, attribute in (
        ("section.card p.answer", "color"),
        ("section.card .soft", "color"),
        ("a", "color"),
        ("svg text", "fill"),
    ):
        colours = tab.locator(selector).evaluate_all(
            f"all => all.map(one => getComputedStyle(one).{attribute})"
        )
        assert colours
        assert min(contrast(paper, colour) for colour in colours) >= 4.5, selector
    for badge in tab.locator(".badge").all()[:40]:
        front, back = badge.evaluate(
            "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
        )
        assert contrast(front, back) >= 4.5
    tab.close()


@pytest.mark.proof
def test_what_scrolls_can_be_reached_with_the_keyboard(browser: Any, page_path: Path) -> None:
    tab, _ = opened(browser, page_path, **PHONE)
    unreachable = (
        "[...document.querySelectorAll('.scroll, .command')].filter(one => one.tabIndex != 0).length"
    )
    assert tab.evaluate(unreachable) == 0
    tab.locator("summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("details").first.evaluate("one => one.open") is True
    tab.close()


@pytest.mark.proof
def test_it_prints_on_paper(browser: Any, page_path: Path) -> None:
    tab, _ = opened(browser, page_path, color_scheme="dark", **DESK)
    tab.emulate_media(media="print")
    ink = tab.locator("p.answer").first.evaluate("one => getComputedStyle(one).color")
    assert contrast(ink, "rgb(255,255,255)") > 10
    assert tab.pdf()[:5] == b"%PDF-"
    tab.close()


HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7 * 7 }}</style></svg></title>"


def poisoned(value: Any, text: str) -> Any:
    """Every text of the value replaced, where it is no word that the format defines."""
    if isinstance(value, dict):
        fixed = ("kind", "style", "columns")
        return {key: part if key in fixed else poisoned(part, text) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part, text) for part in value]
    return text if isinstance(value, str) else value


@pytest.mark.proof
def test_hostile_text_does_nothing_in_a_browser(browser: Any, tmp_path: Path) -> None:
    results = json.loads(json.dumps(example()))
    results["perflab"] = poisoned(results["perflab"], HOSTILE)
    results["perflab"]["labs"] = {f"{name}{HOSTILE}": lab for name, lab in results["perflab"]["labs"].items()}
    tab, wrong = opened(browser, write_page(results, tmp_path / "hostile.html"), **PHONE)
    assert wrong == []
    assert tab.locator("script, img, iframe, object, form").count() == 0
    assert HOSTILE in tab.locator("section.lab .answer").first.inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.close()


@pytest.mark.proof
def test_long_text_stays_inside_the_page(browser: Any, tmp_path: Path) -> None:
    results = json.loads(json.dumps(example()))
    del results["perflab"]["labs"]["concurrency"], results["perflab"]["labs"]["vectorization"]
    results["perflab"] = poisoned(results["perflab"], "x" * 10_000)
    path = write_page(results, tmp_path / "long.html")
    assert path.stat().st_size < 6_000_000
    tab, wrong = opened(browser, path, **PHONE)
    assert wrong == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.close()


def test_a_page_of_plain_benchmarks(browser: Any, tmp_path: Path) -> None:
    tab, wrong = opened(browser, write_page(plain(), tmp_path / "plain.html"), **PHONE)
    assert wrong == []
    text = tab.locator("body").inner_text()
    for word in ("test_sort", "sorting", "13.0 us", "812", "test_find", "200 ms", "Example 9000"):
        assert word in text
    assert "without perflab" in text
    assert "secret-host" not in text
    tab.close()


# --- without a browser ---------------------------------------------------------------------------


def test_the_page_is_small_and_needs_nothing_else(page_path: Path) -> None:
    page = page_path.read_text()
    assert len(page.encode()) < 1_500_000
    words = Words(page)
    assert not {"script", "link-stylesheet", "img", "iframe", "object", "embed", "base"} & set(words.tags)
    assert ("http-equiv", "Content-Security-Policy") in words.attributes
    links = [value or "" for key, value in words.attributes if key in ("href", "src")]
    assert all(link.startswith(("#", "https://doi.org/", "data:,")) for link in links)
    assert ("lang", "en") in words.attributes
    identities = [value for key, value in words.attributes if key == "id"]
    assert len(identities) == len(set(identities))


def test_the_numbers_of_a_figure_are_on_the_page() -> None:
    bars = Bars(
        "t", "speed-up (x)", ["pure Python", "numba"], {"one": [0.0123, 4.56], "two": [789.0, math.nan]}
    )
    shown = view(bars, "a")
    assert shown.header == ["", "one: speed-up (x)", "two: speed-up (x)"]
    assert shown.rows == [["pure Python", "0.01230", "789"], ["numba", "4.560", "-"]]
    assert shown.numeric == [False, True, True]
    page = Words(render_page({"perflab": {"labs": {"one": {"figures": [to_json(bars)]}}}}))
    cells = [word for word in page.text if word.strip()]
    start = cells.index("pure Python", cells.index("two: speed-up (x)"))
    assert cells[start : start + 6] == [cell for row in shown.rows for cell in row]


def test_a_long_table_is_cut_and_it_is_said() -> None:
    xs = [float(i) for i in range(1000)]
    shown = view(Chart("t", "x", "y", [Series("s", xs, xs)]), "a")
    assert len(shown.rows) == 300
    assert shown.left_out == 700


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_comes_out_as_text(text: str) -> None:
    def page(word: str) -> Words:
        claim = {"text": word, "verdict": word, "why": word}
        lab = {"question": word, "answer": word, "claims": [claim], "sources": [word], "error": word}
        return Words(render_page({"perflab": {"command": word, "notes": [word], "labs": {word: lab}}}))

    found = page(text)
    assert found.tags.count("a") == 1 + text.count("http://") + text.count("https://")
    assert [tag for tag in found.tags if tag != "a"] == [tag for tag in page("x").tags if tag != "a"]
    shown = "".join(
        " " if letter.isspace() else letter if letter.isprintable() else "\ufffd" for letter in text
    )
    assert "".join(found.text).count(shown) >= 7


@pytest.mark.proof
def test_a_javascript_address_is_no_link() -> None:
    results = example()
    results["perflab"]["labs"]["roofline"]["sources"] = [
        "javascript:alert(1)",
        "see https://example.org/a<b>",
    ]
    links = [value for key, value in Words(render_page(results)).attributes if key == "href"]
    assert not [link for link in links if link and "javascript" in link]
    assert "https://example.org/a" in links
    assert split_links("a http://b c") == [("a ", False), ("http://b", True), (" c", False)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("labs",), [], "perflab.labs must be an object"),
        (
            ("labs", "roofline", "seconds"),
            "soon",
            "perflab.labs.roofline.seconds must be a number, not 'soon'",
        ),
        (("labs", "roofline", "question"), 7, "perflab.labs.roofline.question must be text"),
        (
            ("labs", "roofline", "predictions", 3, "measured"),
            True,
            r"predictions\[3\].measured must be a number",
        ),
        (("labs", "roofline", "predictions", 3, "exact"), "no", "exact must be true or false"),
        (
            ("labs", "roofline", "figures", 0, "kind"),
            "pie",
            "kind must be chart, bars or timeline, not 'pie'",
        ),
        (
            ("labs", "roofline", "figures", 0, "series", 0, "y"),
            [1],
            r"series\[0\] must be a series with as many y",
        ),
        (("labs", "roofline", "figures", 0, "series", 0, "style"), "dots", "must be points, line or dashed"),
        (
            ("labs", "vectorization", "figures", 0, "series", "pairwise"),
            [1],
            "must be one value for each of the 7",
        ),
        (
            ("labs", "concurrency", "figures", 1, "rows", 0),
            ["w"],
            "must be a worker's name and its list of spans",
        ),
        (("labs", "roofline", "predictions", 0, "predicted"), 10**400, "must be a number below 1e308"),
        (("notes",), {}, "perflab.notes must be a list"),
        (("machine",), "fast", "perflab.machine must be an object"),
        (("format",), 2, "written by a newer perflab"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    results = copy.deepcopy(example())
    place = results["perflab"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        render_page(results)


@pytest.mark.parametrize(
    "results", [{}, {"benchmarks": None}, [], "text", None, {"perflab": []}, {"benchmarks": {}}]
)
def test_what_is_no_results_file_is_refused(results: Any) -> None:
    with pytest.raises(ValueError, match="results: "):
        render_page(results)


def test_what_is_missing_is_left_out() -> None:
    page = render_page(
        {"perflab": {"labs": {"bare": {}, "failed": {"status": "failed", "error": "no memory"}}}}
    )
    text = " ".join(Words(page).text)
    assert "This lab failed." in text
    assert "no memory" in text
    assert "its roofline cannot be drawn" in text
    assert "No lab has finished yet" in " ".join(
        Words(render_page({"perflab": {"labs": {}, "format": 1}})).text
    )


@pytest.mark.parametrize(
    "machine",
    [
        {"name": "x"},
        {
            "name": "x",
            "measured": True,
            "constants": {"cores": 2},
            "curves": {"copy_1": {"working_set_bytes": [], "bytes_per_second": []}},
        },
    ],
)
def test_a_machine_without_constants_has_a_note_and_no_chart(machine: dict[str, Any]) -> None:
    page = render_page({"perflab": {"machine": machine, "labs": {}}})
    assert "roofline cannot be drawn" in page
    assert "<svg" not in page


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")
    (tmp_path / "reader").hardlink_to(target)
    assert write_page(plain(), str(target)) == target
    assert target.read_text().startswith("<!DOCTYPE html>")
    # Whoever had the old page open still has it whole: it was replaced, not written over.
    assert (tmp_path / "reader").read_text() == "before"
    with pytest.raises(ValueError, match=r"cannot be written to .*nowhere"):
        write_page(plain(), tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        write_page(plain(), tmp_path / "folder")
    with pytest.raises(ValueError, match="results"):
        write_page({}, target)
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html", "reader"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-22T18:41:07.123456+00:00", "2026-11-22 18:41 UTC"),
        ("2026-11-22T18:41:07", "2026-11-22 18:41"),
        ("2026-11-22T18:41:07+02:00", "2026-11-22 18:41 +02:00"),
        ("yesterday", "yesterday"),
    ],
)
def test_moments_are_readable(text: str, shown: str) -> None:
    assert moment(text) == shown


def test_importing_the_report_is_cheap() -> None:
    heavy = ["torch", "jax", "numba", "ray", "matplotlib", "jinja2", "rich", "numpy"]
    code = f"import sys, bench.report; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.proof
def test_drawing_needs_no_heavy_package(tmp_path: Path) -> None:
    results = example()
    del results["perflab"]["labs"]["roofline"], results["perflab"]["labs"]["vectorization"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    code = (
        "import sys, json; from bench.report import write_page\n"
        f"write_page(json.load(open({str(tmp_path / 'results.json')!r})), {str(tmp_path / 'page.html')!r})\n"
        "print([name for name in ('torch', 'jax', 'numba', 'ray') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"
