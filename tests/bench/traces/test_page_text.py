"""A trace's page without a browser: what it says, what it counts, and that any text comes out as text."""

import json
from collections import Counter
from html.parser import HTMLParser

import pytest
from drawn_job import MS, job, trace_of, training
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import SAMPLES, write

from bench.traces.diff import difference
from bench.traces.events import Kind, Memory
from bench.traces.job_report import examine, sentence
from bench.traces.load import load
from bench.traces.page import (
    render_difference_page,
    render_trace_page,
    write_difference_page,
    write_trace_page,
)
from bench.traces.page.document import script


class Words(HTMLParser):
    """The text of a page, its tags and its attributes; what scripts hold is not its text."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes = [], [""], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1] not in ("script", "style"):
            self.text.append(data)

    def __str__(self):
        return " ".join(" ".join(self.text).split())


def test_a_page_says_how_the_time_was_spent():
    report = examine(job(training()))
    text = str(Words(render_trace_page(report.job, report)))
    assert sentence(report)[1:] in text
    assert "device NVIDIA H100" in text
    # The first step: from 0 to 9 ms, gemm takes 2 and all_reduce 1.
    assert "ProfilerStep#0 9.00 ms 2.00 ms 22.2 % 1.00 ms 11.1 % 6.00 ms 66.7 % 0 %" in text
    for name in ("ProfilerStep#3", "aten::mm [[64, 32], [32, 16]]", "gemm", "all_reduce", "cudaLaunchKernel"):
        assert name in text
    assert "4 MiB" in text  # the peak of memory


def test_ranks_are_compared():
    report = examine(job(training(0, "rank0.json"), training(1, "rank1.json")))
    text = str(Words(render_trace_page(report.job, report)))
    assert sentence(report)[1:] in text
    assert "The ranks beside each other" in text
    assert "rank 0 36.0 ms 8.00 ms" in text
    assert "Rank 0 in detail" in text


def test_ranks_stand_on_the_clock_of_their_collectives():
    ranks = job(training(0, "rank0.json"), training(1, "rank1.json"))
    ranks.traces[1].events.start += 3 * MS  # its clock is ahead, and the files do not say when they began
    page = render_trace_page(ranks)
    block = page.split('<script type="application/json" id="drawn">')[1].split("</script>")[0]
    groups = json.loads(block)["timeline"]["groups"]
    assert [group["name"] for group in groups] == ["rank 0", "rank 1"]
    assert groups[0]["steps"] == groups[1]["steps"]


def test_nothing_is_left_out_in_silence():
    trace = training()
    trace.dropped = Counter({"slices without a duration": 3})
    trace.unclassified = Counter({"strange <b>": 12})
    trace.notes = ["the clock jumped"]
    failed = [("rank7.json", "it ends in the middle of a slice")]
    text = str(Words(render_trace_page(job(trace, failures=failed))))
    assert "Not read: 3 slices without a duration." in text
    assert "12 slices are in no sum: strange <b> (12)." in text
    assert "the clock jumped" in text
    assert "rank7.json: it ends in the middle of a slice" in text


def test_a_difference_says_what_changed():
    base, new = job(training()), job(training(slow=1.5))
    found = difference(base, new)
    text = str(Words(render_difference_page(base, new, found)))
    assert found.sentence[1:] in text
    assert "aten::mm [64,32]x[32,16]" in text
    assert "+1.00 ms" in text
    assert "gemm 0 s 0 s 2.00 ms 3.00 ms" in text  # in the table of the call tree


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_has_a_page(name, tmp_path):
    found = load(write(tmp_path, name))
    page = Words(render_trace_page(found))
    text = str(page)
    assert f"slices {len(found.traces[0].events)} " in text
    assert " ".join(sentence(examine(found))[1:].split()) in text
    assert f"format {found.traces[0].format} " in text
    identities = [value for key, value in page.attributes if key == "id"]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("traces", [[], [trace_of([])], [trace_of([("x", Kind.OPERATOR, 0, 5, 0, -1)])]])
def test_what_is_empty_has_a_page_too(traces):
    text = str(Words(render_trace_page(job(*traces))))
    assert "nan" not in text.lower()
    assert f"slices {sum(len(trace.events) for trace in traces)}" in text


def test_what_has_no_place_in_time_has_tables_and_no_timeline():
    trace = training()
    trace.timed = False
    page = render_trace_page(job(trace))
    assert 'id="timeline"' not in page
    assert "aten::mm" in str(Words(page))


@example("<b>")
@example('"></th><script>')
@settings(max_examples=8, deadline=None)
@given(st.text(alphabet=st.characters(), min_size=1, max_size=40))
def test_any_name_comes_out_as_text(name):
    def shape(word):
        trace = training(rename=lambda text: f"{text}{word}!")
        trace.memory = Memory.empty()  # its figure takes longest to draw, and has no names
        return Words(render_trace_page(job(trace))).tags

    assert shape(name) == shape("x")


def test_a_page_asks_for_nothing_and_allows_one_script():
    page = Words(render_trace_page(job(training())))
    policy = next(value for key, value in page.attributes if key == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    assert page.tags.count("script") == 2  # the data, and what draws it
    assert not {"img", "iframe", "object", "embed", "base", "link-stylesheet"} & set(page.tags)
    links = [value for key, value in page.attributes if key in ("src", "href")]
    assert [link for link in links if not link.startswith("#")] == ["data:,"]


def test_the_script_cannot_end_itself_nor_make_html():
    text = script()
    assert "</script" not in text
    assert "<!--" not in text
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
        assert word not in text


def test_pages_are_written_whole(tmp_path):
    base = job(training())
    assert write_trace_page(base, tmp_path / "page.html") == tmp_path / "page.html"
    write_difference_page(base, base, difference(base, base), tmp_path / "difference.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["difference.html", "page.html"]
    with pytest.raises(ValueError, match=r"cannot be written to .*nowhere"):
        write_trace_page(base, tmp_path / "nowhere" / "page.html")


def test_a_megabyte_of_a_name_costs_a_line():
    long = training(rename=lambda text: text + "x" * 10**6)
    assert len(render_trace_page(job(long)).encode()) < 300_000
