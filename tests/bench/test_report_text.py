"""Terminal and Markdown: complete on 80 columns, in a log, in ASCII; no text of a file is markup."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.report import format_interval, format_ratio, format_value, print_lab, to_markdown
from bench.report.markdown import code, escape

_module = runpy.run_path(str(Path(__file__).with_name("report_example.py")))
example, plain = _module["example"], _module["plain"]
LABS = example()["perflab"]["labs"]


def printed(lab: dict[str, Any], width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_lab(lab, Console(file=file, width=width, force_terminal=False), "name")
    file.flush()
    return raw.getvalue().decode(encoding)


def solid(text: str) -> str:
    """Without the white space that wrapping moves about."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", list(LABS))
def test_a_log_of_80_columns_has_every_number(name: str) -> None:
    lab = LABS[name]
    text = printed(lab)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert lab["question"] in text
    for item in lab["predictions"]:
        exact = item["exact"]
        measured = (
            format_value(item["key"], item["measured"], exact=True)
            if exact
            else format_interval(item["key"], item["measured"], item["low"], item["high"])
        )
        predicted = format_value(item["key"], item["predicted"], exact=exact)
        line = next(line for line in text.splitlines() if predicted in line and measured in line)
        assert item["verdict"] in line
    for group in lab["groups"]:
        for row in group["rows"]:
            assert format_interval("time_s", row["seconds"], row["low"], row["high"]) in text
    assert "✓ SIMD is at least four" in text
    assert "✗ More threads always help." in text
    assert "? Compiled code beats eager code." in text
    assert "no CUDA device" in text
    assert "page faults of the fresh output" in text  # the suspect of what is off


def test_the_allocator_is_shown_only_where_there_are_two() -> None:
    assert "malloc" in printed(LABS["vectorization"])
    assert "malloc" not in printed(LABS["concurrency"])
    assert re.search(r"numba_simd +default .*\n +tuned ", printed(LABS["vectorization"]))


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    text = printed(LABS["concurrency"], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("confirmed") + text.count("close") > 10 or width < 60
    digits = sum(letter.isdigit() for letter in printed(LABS["concurrency"], 120))
    assert sum(letter.isdigit() for letter in text) == digits


def test_ascii_output_has_words_for_signs() -> None:
    text = printed(LABS["concurrency"], encoding="ascii")
    assert "ok SIMD is at least four" in text
    assert "FAILS More threads always help." in text


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_brackets_are_no_markup_on_a_terminal(text: str) -> None:
    word = f"[bold]{text}[/nothing]"
    lab = {
        "question": word,
        "claims": [{"text": word, "verdict": "holds"}],
        "unavailable": [{"variant": word, "reason": "r"}],
    }
    shown = printed(lab, width=200)
    assert shown.count("[bold]") == 3
    assert shown.count("[/nothing]") == 3
    assert "\x1b" not in shown


def test_a_failed_lab_and_a_failed_check_are_said() -> None:
    check = {"variant": "a/b", "error": 0.5, "tolerance": 1e-6, "against": "float64", "passed": False}
    for show in (printed, lambda lab: to_markdown({"perflab": {"labs": {"name": lab}}})):
        text = show({"status": "failed", "error": "no memory left", "checks": [check]})
        assert "failed" in text
        assert "no memory left" in text
        assert "a/b" in text
    assert "error 0.5 exceeds 1e-06 against float64" in printed({"checks": [check]})


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"perflab.labs.name.claims must be a list, not 'all'"):
        printed({"claims": "all"})
    with pytest.raises(ValueError, match="must be an object"):
        print_lab([], Console(file=io.StringIO()))  # type: ignore[arg-type]


# --- markdown ------------------------------------------------------------------------------------


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, by row."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        inside = line.startswith("|")
    return found


def test_markdown_has_every_prediction_and_every_time() -> None:
    text = to_markdown(example())
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    rows = [row for table in tables(text) for row in table]
    for lab in LABS.values():
        for item in lab["predictions"]:
            if not item["exact"] and item["measured"] is not None:
                measured = format_interval(item["key"], item["measured"], item["low"], item["high"])
                name = f"`{item['variant'] or item['key']}`"
                found = [row for row in rows if measured in row and name in row]
                assert found
                assert all(item["verdict"] in row[-1] for row in found)
                assert all(format_value(item["key"], item["predicted"]) in row for row in found)
        for row_data in (row for group in lab["groups"] for row in group["rows"]):
            assert format_interval("time_s", row_data["seconds"], row_data["low"], row_data["high"]) in text
        assert lab["question"] in text
        assert lab["command"] in text
    assert "✗ **fails**: More threads always help." in text
    typical = 2 ** LABS["roofline"]["summary"]["median_abs_log2"]
    assert f"{format_ratio(typical)} (of 32)" in text


def test_markdown_of_plain_benchmarks() -> None:
    text = to_markdown(plain())
    assert ["`test_sort`", "13.0 us", "11.0 us", "400 ns", "812"] in tables(text)[0]
    assert "without perflab" in text


@given(st.text(alphabet="ab|`<>&@#[]()*_~$\\!-+1. \n:/", max_size=40))
def test_markdown_text_stays_inside_its_cell(text: str) -> None:
    item = {
        "variant": text,
        "key": "time_s",
        "predicted": 1.0,
        "measured": 2.0,
        "verdict": text,
        "column": text,
    }
    results = {
        "perflab": {"labs": {text: {"question": text, "predictions": [item, {**item, "column": "x"}]}}}
    }
    (table,) = tables(to_markdown(results))
    assert len({len(row) for row in table}) == 1


@given(st.text(max_size=60))
def test_markdown_text_has_no_html_and_notifies_nobody(text: str) -> None:
    shown = escape(text)
    assert not re.search(r"[<>]|@\w|#\d|(?<!\\)[`*_\[\]|~$]|://\w", shown.replace("\\\\", ""))
    assert code(text).count("`") == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2-core CPU (load 3.1)", "2-core CPU (load 3.1)"),
        ("a|b", "a\\|b"),
        ("<b>", "&lt;b&gt;"),
        ("- item", "\\- item"),
        ("[a](javascript:b)", "\\[a\\](javascript:b)"),
    ],
)
def test_markdown_escapes_only_what_it_must(text: str, shown: str) -> None:
    assert escape(text) == shown
