"""``perflab compare`` of two profiler reports: the real command, mostly within this process."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import samples
from command import perflab
from msgspec.structs import replace

from bench.traces.diff import difference
from bench.traces.events import Job
from bench.traces.load import load
from bench.traces.steps import steps

SHARED = Path(__file__).resolve().parents[4] / "shared" / "traces"


def write(path, milliseconds, steps=8, name="aten::mm"):
    """A Kineto file of a loop: one operation of so many milliseconds a step, half a millisecond between."""
    events, time = [], 0.0
    for step in range(steps):
        length = 1000 * milliseconds + step  # microseconds; no two steps are equal
        mark = {"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{step}", "ts": time}
        events.append({**mark, "dur": length + 500, "pid": 1, "tid": 1})
        operation = {"ph": "X", "cat": "cpu_op", "name": name, "ts": time + 250, "dur": length}
        events.append({**operation, "pid": 1, "tid": 1, "args": {"Input Dims": [[64, 32], [32, 16]]}})
        time += length + 500
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "base.json", 10), write(tmp_path / "new.json", 12)


def test_the_sentence_comes_first_and_the_gate_fails(pair, tmp_path, run):
    status, out, err = perflab("compare", *pair, "--fail-above", "5%", folder=tmp_path)
    assert status == 1
    assert err == "the step is slower by more than 5 %\n"
    assert out.startswith("the step is 19.0 % slower (+2.00 ms of 10.5 ms): aten::mm")
    assert max(map(len, out.splitlines())) <= 80
    assert run("compare", *pair, "--fail-above", "50%")[0] == 0
    assert run("compare", *reversed(pair), "--fail-above", "5%")[0] == 0


def test_json_and_markdown_say_the_same(pair, run):
    status, out, _ = run("compare", *pair, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["verdict"], found["rows"][0]["name"], found["rows"][0]["verdict"]) == (
        "slower",
        "aten::mm",
        "slower",
    )
    assert sum(row["seconds"] for row in found["rows"]) == pytest.approx(found["step"]["seconds"])
    markdown = run("compare", *pair, "--markdown")[1]
    assert markdown.startswith("**the step is 19.0 % slower")
    assert "| `aten::mm [64,32]x[32,16]` | +2.00 ms |" in markdown


def test_folders_of_ranks(tmp_path, run):
    for side, milliseconds in (("base", (10, 10)), ("new", (10, 14))):
        for rank, ms in enumerate(milliseconds):
            write(tmp_path / side / f"rank{rank}.json", ms)
    status, out, _ = run("compare", tmp_path / "base", tmp_path / "new")
    assert status == 0
    assert "19.0 % slower" in out
    assert "the median step of each rank" in out


def test_a_rank_that_cannot_be_read_fails_the_command(tmp_path, run):
    for side in ("base", "new"):
        for rank in range(2):
            write(tmp_path / side / f"rank{rank}.json", 10)
    (tmp_path / "new" / "rank1.json").write_text('{"traceEvents": [')
    status, out, err = run("compare", tmp_path / "base", tmp_path / "new", "--fail-above", "5%")
    assert status == 1
    assert out.startswith("same: the step takes")
    (line,) = err.splitlines()
    assert line.startswith("perflab: ")
    assert "rank1.json" in line


def test_a_page_is_written(pair, tmp_path, run):
    status, out, _ = run("compare", *pair, "--output", tmp_path / "page.html")
    assert status == 0
    assert f"page: {tmp_path / 'page.html'}" in out
    assert "aten::mm" in (tmp_path / "page.html").read_text()


def test_a_report_against_results_is_refused(pair, tmp_path, run):
    results = tmp_path / "results.json"
    results.write_text('{"benchmarks": [], "machine_info": {}}')
    status, _, err = run("compare", pair[0], results)
    assert status == 2
    assert "base.json is a profiler report and" in err
    assert err.count("\n") == 1


def test_a_page_of_results_is_refused(tmp_path, run):
    results = tmp_path / "results.json"
    results.write_text('{"benchmarks": [], "machine_info": {}}')
    status, _, err = run("compare", results, results, "--output", "page.html")
    assert (status, err.count("\n")) == (2, 1)


def test_a_gate_needs_steps(tmp_path, run):
    pair = write(tmp_path / "base.json", 10, steps=2), write(tmp_path / "new.json", 12, steps=2)
    assert run("compare", *pair)[0] == 0
    status, _, err = run("compare", *pair, "--fail-above", "5%")
    assert status == 2
    assert "5 steps or more" in err


def test_names_of_strangers_do_nothing(tmp_path, run):
    name = "\x1b[31mred[bold]</b><script>alert(1)</script>|`\n"
    pair = write(tmp_path / "base.json", 10, name=name), write(tmp_path / "new.json", 12, name=name)
    out = run("compare", *pair)[1]
    assert "\x1b" not in out
    assert "red[bold]" in out.replace("\n", "")
    markdown = run("compare", *pair, "--markdown")[1]
    assert "\x1b" not in markdown
    sentence, *lines = markdown.splitlines()
    assert "&lt;script&gt;" in sentence
    assert "<script>" not in sentence
    for line in lines:  # in a table names stand in code spans
        assert "<script>" not in re.sub(r"`[^`]*`", "", line)


@pytest.mark.parametrize(
    ("base", "new", "said"),
    [
        ("kineto_v100_resnet50_workers0.json.gz", "kineto_v100_resnet50_workers4.json.gz", "27.4 % faster"),
        (
            "tracelens_h100_qwen0.5b.json.gz",
            "tracelens_mi300_qwen0.5b.json.gz",
            "aten::mm [8944,1024]x[1024,2816]",
        ),
        ("tracelens_h100_bert_small.json.gz", "tracelens_mi300_bert_small.json.gz", "other kernels"),
    ],
)
def test_real_pairs_get_a_true_sentence(base, new, said, run):
    """Workers take the idle time of the data loader away; another vendor's kernels, the same operators."""
    if not (SHARED / base).exists():
        pytest.skip(f"there is no ../shared/traces/{base}")
    status, out, _ = run("compare", SHARED / base, SHARED / new, "--json")
    found = json.loads(out)
    assert status == 0
    assert said in found["sentence"]
    if "workers" in base:
        assert found["rows"][0]["name"] == "enumerate(DataLoader)"
        assert (found["rows"][0]["what"], found["verdict"]) == ("idle", "faster")


@pytest.mark.parametrize("name", sorted(samples.SAMPLES))
def test_every_kind_of_report_is_same_as_itself_and_half_as_long_as_one_of_twice_the_time(name, tmp_path):
    job = load(samples.write(tmp_path, name))
    found = difference(job, job)
    assert found.step.verdict == "same"
    assert found.rows
    assert all(row.seconds == 0 for row in found.rows)
    (trace,) = job.traces
    events = replace(trace.events, start=2 * trace.events.start, duration=2 * trace.events.duration)
    found = difference(job, Job("slow", [replace(trace, events=events)]))
    marked = steps(trace)
    length = float(np.mean(marked.end - marked.start)) if trace.timed else trace.events.duration.sum()
    assert (found.base_seconds, found.new_seconds) == pytest.approx((length / 1e9, 2 * length / 1e9))
    assert sum(row.seconds for row in found.rows) == pytest.approx(length / 1e9)
    assert sum(row.base_seconds for row in found.rows) == pytest.approx(length / 1e9)
