"""Texts that a variant keeps: from its recorder to the page, line by line, as they are."""

from __future__ import annotations

import pytest
from test_report_page import HOSTILE, Words

from bench.measure import LONGEST_TEXT, RoundRecorder
from bench.report import render_page
from bench.report.fields import Field


def test_a_text_outlives_the_rounds_and_the_last_of_a_title_counts() -> None:
    recorder = RoundRecorder()
    recorder.text("program", "first")
    recorder.begin_round()
    recorder.text("program", "second")
    recorder.begin_round()
    assert recorder.texts == {"program": "second"}
    assert recorder.values == {}


def test_a_long_text_says_how_much_is_left_out() -> None:
    recorder = RoundRecorder()
    recorder.text("fits", "x" * LONGEST_TEXT)
    recorder.text("long", "x" * (LONGEST_TEXT + 7))
    assert recorder.texts["fits"] == "x" * LONGEST_TEXT
    assert recorder.texts["long"] == "x" * LONGEST_TEXT + "\n... 7 more letters are left out"


def page_with(**listing: object) -> str:
    lab = {"question": "What is captured?", "listings": [listing]}
    return render_page({"benchmarks": [], "perflab": {"format": 1, "labs": {"small": lab}}})


def test_the_page_shows_lines_and_indents_as_they_are() -> None:
    page = page_with(variant="chain/jax_jit", title="jaxpr", text="let\n    b = a < 2\n\tin b")
    text = "".join(Words(page).text)
    assert "chain/jax_jit: jaxpr" in text
    assert "let\n    b = a < 2\n    in b" in text


def test_a_text_can_do_nothing_to_the_page() -> None:
    page = page_with(variant=HOSTILE, title=HOSTILE, text=f"one\n{HOSTILE}\n\x1b[31mred\x00")
    words = Words(page)
    assert not {"script", "img"} & set(words.tags)
    text = "".join(words.text)
    assert f"one\n{HOSTILE}\n\ufffd[31mred\ufffd" in text


def test_a_listing_that_is_no_text_is_named() -> None:
    with pytest.raises(ValueError, match=r"labs\.small\.listings\[0\]\.text must be text, not 7"):
        page_with(variant="chain/jax_jit", title="jaxpr", text=7)


def test_without_a_text_there_are_no_lines() -> None:
    assert Field(None).lines() == ""
