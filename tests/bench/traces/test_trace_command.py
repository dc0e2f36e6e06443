"""``perflab trace``: what it prints, writes and refuses, run as a user runs it."""

import functools
import io
import json
import re
import subprocess
import sys

import pytest
import samples
from command import perflab
from rich.console import Console
from tables_of_events import COMPUTE_STREAM, MAIN, trace

from bench.traces import analysis_text
from bench.traces.analysis import analyse
from bench.traces.commands import Limit
from bench.traces.events import Job, Kind, Lane
from bench.traces.job_report import JobReport, examine, sentence, to_json
from bench.traces.load import load
from bench.traces.markdown import to_markdown
from bench.traces.tables import Columns, percent
from bench.traces.terminal import print_report, print_table

NASTY = "<script>alert(1)</script>\x1b[31m\x07[bold]x[/bold] | `a` ![](http://x.y)\n# @all"


def printed(report, width=80, top=10):
    file = io.StringIO()
    print_report(report, Console(file=file, width=width), top)
    return file.getvalue()


def of(made):
    return examine(Job("made", [made]))


@pytest.fixture
def run(run):
    return functools.partial(run, "trace")


@pytest.fixture
def gpu(tmp_path):
    return samples.write(tmp_path, "kineto")


@pytest.fixture
def ranks(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    for rank in range(2):
        (folder / f"rank{rank}.json").write_bytes(samples.kineto_gloo(rank))
    return folder


def test_one_sentence_says_what_dominates(gpu, tmp_path):
    status, out, err = perflab("trace", gpu, folder=tmp_path)
    assert (status, err) == (0, "")
    text = " ".join(out.split())
    assert text.startswith("device 0 (NVIDIA H100 80GB HBM3), 185 us: compute 54.1 %")
    assert "exposed communication 32.4 % (ncclDevKernel_AllReduce" in text
    for title in ("Time", "Steps", "Why devices were idle", "Kernels, copies and collectives", "Memory"):
        assert title in out
    assert "left out: 4 flow arrows" in out


@pytest.mark.parametrize("name", samples.SAMPLES)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_format_fits_the_terminal_and_prints_no_nan(name, width, tmp_path):
    report = examine(load(samples.write(tmp_path, name)))
    out = printed(report, width)
    assert max(map(len, out.splitlines())) <= width
    assert not re.search(r"\bnan\b|\binf\b|None", out)
    json.dumps(to_json(report), allow_nan=False)
    assert to_markdown(report, 10).startswith("**")


def test_json_has_the_times_to_the_nanosecond(run, gpu):
    status, out, _ = run(gpu, "--json")
    assert status == 0
    data = json.loads(out)
    (one,) = data["traces"]
    assert data["time_unit"] == "ns"
    assert one["time"] == {
        "span": 185_000,
        "compute": 100_000,
        "exposed": 60_000,
        "copies": 10_000,
        "idle": 15_000,
        "overlapped": 20_000,
    }
    assert [step["name"] for step in one["steps"]] == ["ProfilerStep#0", "ProfilerStep#1"]
    assert sum(reason["time"] for unit in one["units"] for reason in unit["idle"]) == 15_000
    assert one["dropped"]["flow arrows"] == 4


def test_a_folder_is_a_job_of_ranks(run, ranks):
    status, out, _ = run(ranks)
    assert status == 0
    assert out.startswith("2 ranks: ")
    assert re.search(r"rank 0 host +101 us", out)
    assert re.search(r"rank 1 host +101 us", out)
    assert "in detail" in out


def test_of_one_step_what_ranks_wait_is_said_to_be_of_all(ranks):
    job = load(ranks)
    assert sentence(examine(job)).startswith("2 ranks: ")
    report = examine(job, "3")
    assert sentence(report).startswith("2 ranks, over all steps: ")
    assert printed(report).startswith("2 ranks, over all steps: ")


def test_several_files_are_one_job_too(run, ranks):
    status, out, _ = run(ranks / "rank1.json", ranks / "rank0.json", "--json")
    assert status == 0
    assert [one["rank"] for one in json.loads(out)["traces"]] == [0, 1]


def test_a_broken_rank_is_a_line_and_the_others_are_reported(run, ranks):
    (ranks / "rank2.json").write_bytes(b"")
    status, out, err = run(ranks)
    assert status == 1
    assert out.startswith("2 ranks: ")
    (line,) = err.splitlines()
    assert "rank2.json" in line
    assert "empty" in line


def test_only_one_step(run, gpu):
    status, out, _ = run(gpu, "--step", "1", "--json")
    (one,) = json.loads(out)["traces"]
    assert (status, one["step"], one["time"]["span"]) == (0, "ProfilerStep#1", 100_000)
    assert {kernel["calls"] for kernel in one["kernels"]} == {1}
    assert [wait["time"] for wait in one["units"][0]["waits_for_streams"]] == [30_000]
    assert [use["samples"] for use in one["memory"]] == [1]
    status, out, err = run(gpu, "--step", "7")
    assert (status, out) == (2, "")
    assert err == "perflab: there is no step 7; the steps are ProfilerStep#0 to ProfilerStep#1\n"


def test_gates(run, gpu):
    assert run(gpu, "--max-idle", "9%", "--max-exposed", "0.33")[0] == 0
    status, out, err = run(gpu, "--max-idle", "8%", "--max-exposed", "30%")
    assert status == 1
    assert out
    assert err.splitlines() == [
        "perflab: idle 8.1 %, more than 8 %",
        "perflab: exposed communication 32.4 %, more than 30 %",
    ]


def test_gates_on_ranks_name_the_rank():
    operator = (Kind.OPERATOR, "aten::mm", MAIN, 0, 50)
    late = (Kind.ANNOTATION, "forward", MAIN, 0, 100)
    job = Job("job", [trace([operator], rank=0), trace([operator, late], rank=1)])
    report = JobReport(job, [analyse(one) for one in job.traces], ranks=examine(job).ranks)
    assert Limit.of("--max-idle", "20%").broken(report) == ["rank 1: idle 50.0 %, more than 20 %"]


def test_a_gate_that_nothing_can_break_is_refused():
    sums = of(trace([(Kind.FUNCTION, "f", MAIN, 0, 10)], timed=False))
    with pytest.raises(ValueError, match="no times that --max-idle could hold"):
        Limit.of("--max-idle", "20%").broken(sums)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trace takes a profiler report"),
        (["absent.json"], "absent.json"),
        (["{gpu}", "--max-idle", "many"], "--max-idle takes a share such as 5%, not 'many'"),
        (["{gpu}", "--max-exposed", "150%"], "--max-exposed takes a share up to 100%"),
        (["{gpu}", "--json", "--markdown"], "exclude each other"),
        (["{gpu}", "--top", "0"], "--top"),
        (["{folder}/results.json"], "results.json"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, gpu, tmp_path, run):
    (tmp_path / "results.json").write_bytes(samples.benchmarks())
    words = [word.format(gpu=gpu, folder=tmp_path) for word in arguments]
    status, out, err = run(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_names_of_strangers_do_nothing():
    lane = Lane(NASTY, NASTY, device=0)
    rows = [
        (Kind.OPERATOR, NASTY, MAIN, 0, 50, {"shape": NASTY}),
        (Kind.KERNEL, NASTY, lane, 60, 90),
        (Kind.COMMUNICATION, NASTY + "2", lane, 95, 99),
    ]
    made = trace(rows, (MAIN, lane), facts={NASTY: NASTY}, notes=[NASTY])
    made.dropped[NASTY] = 3
    report = of(made)
    shown = printed(report, 200)
    assert not set(shown) & set("\x1b\x07")
    assert "[bold]x[/bold]" in shown  # as it is, not as rich markup
    table = to_markdown(report, 10)
    assert not set(table) & set("\x1b\x07")
    outside = re.sub(r"`[^`\n]*`", "", table)  # what is not code: nothing of it may be markup
    assert "<script" not in outside
    assert "![" not in outside
    assert "@all" not in outside
    for line in table.splitlines():
        if line.startswith("|"):
            assert line.count("`") % 2 == 0


def test_cells_of_any_table_are_made_printable():
    file = io.StringIO()
    print_table(
        Columns("Ranks", [("rank", True), ("", False)], [["1", NASTY]]), Console(file=file, width=300)
    )
    assert not set(file.getvalue()) & set("\x1b\x07")
    assert "[bold]x[/bold]" in file.getvalue()


def test_a_name_of_a_page_is_short_in_tables_and_whole_in_json():
    name = "void at::native::kernel<" + "x" * 2000 + ">"
    made = of(trace([(Kind.KERNEL, name, COMPUTE_STREAM, 0, 9)]))
    assert len(analysis_text.sentence(made.analyses[0])) < 200
    assert "at::native::kernel<xxx" in printed(made)
    assert to_json(made)["traces"][0]["kernels"][0]["name"] == name


@pytest.mark.parametrize(
    ("part", "text"), [(0, "0 %"), (1, "<0.1 %"), (500, "5.0 %"), (9999, ">99.9 %"), (10_000, "100 %")]
)
def test_what_is_little_is_not_nothing_and_what_is_much_is_not_all(part, text):
    assert percent(part, 10_000) == text
    assert percent(0, 0) == "-"


def test_what_is_not_shown_is_counted():
    rows = [(Kind.OPERATOR, f"op {i}", MAIN, 10 * i, 10 * i + 5) for i in range(30)]
    shown = printed(of(trace(rows)), top=4)
    assert "26 more operations" in shown
    assert shown.count("op ") >= 4


def test_a_cause_is_summed_over_devices():
    streams = [Lane("GPU", "stream 7", device=number) for number in range(2)]
    rows = [(Kind.KERNEL, "gemm", stream, start, start + 10) for stream in streams for start in (0, 90)]
    said = analysis_text.sentence(analyse(trace(rows, streams)))
    assert said.startswith("2 devices, 200 ns: idle 80.0 % (most for one cause: unknown: the launch is not")
    assert "160 ns" in said


def test_an_operation_that_was_never_called_has_no_mean():
    made = trace([(Kind.FUNCTION, "f", MAIN, 0, 30, {"calls": 0})], timed=False)
    assert "30.0 ns" in printed(of(made))


def test_a_trace_of_nothing_says_so():
    assert analysis_text.sentence(analyse(trace([]))) == "nothing was recorded"
    assert printed(of(trace([]))).startswith("nothing was recorded")


def test_a_report_of_sums_says_what_it_cannot_tell():
    made = trace([(Kind.FUNCTION, "f", MAIN, 0, 30), (Kind.FUNCTION, "g", MAIN, 30, 100)], timed=False)
    out = printed(of(made))
    assert out.startswith("100 ns in 2 operations, most in g: 70.0 % of it")
    assert "what ran when, and what was idle, cannot be said" in " ".join(out.split())


def test_the_page_and_the_merged_trace_are_written(run, ranks, tmp_path):
    written = ["--output", tmp_path / "page.html", "--merge", tmp_path / "all.json.gz"]
    status, out, err = run(ranks, *written, "--markdown")
    assert status == 0
    assert out.startswith("**2 ranks: ")
    assert f"page: {tmp_path / 'page.html'}" in err
    assert "merged trace: " in err
    assert (tmp_path / "page.html").read_text().lower().startswith("<!doctype html>")
    assert run(tmp_path / "all.json.gz")[0] == 0


def test_no_heavy_package_is_imported(gpu, tmp_path):
    heavy = ("torch", "jax", "numba", "ray", "triton", "pandas", "matplotlib")
    probe = (
        "import sys\nfrom bench import cli\n"
        f"sys.argv = ['perflab', 'trace', {str(gpu)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stderr == "[]\n"
