"""``perflab run``: one command predicts, measures, proves and reports, whatever goes wrong on the way."""

import os
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from command import PERFLAB, bring_labs, perflab, read

from bench import calibrating, runner
from bench.journal import Journal
from bench.progress import Progress
from bench.request import Request, settings_of
from labs.machine import Machine

BESIDE_OTHERS = [PERFLAB[0], "-P", *PERFLAB[1:]]  # as the installed command: modules of the folder come last


def test_it_prints_question_table_and_page(finished_run):
    folder, out = finished_run
    assert "How fast does Python sort?" in out
    for word in ("predicted", "measured", "ratio", "verdict", "results.html"):
        assert word in out
    assert (folder / "results.html").stat().st_size > 10_000
    assert not list(folder.glob("*.journal"))


def test_each_variant_has_samples_predictions_and_facts(results):
    by_name = {entry["extra_info"]["variant"]: entry for entry in results["benchmarks"]}
    assert set(by_name) == {"first/sorted", "second/sorted", "second/insertion"}
    entry = by_name["second/sorted"]
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) >= 3
    extra = entry["extra_info"]
    assert set(extra["predicted"]) == {"time_s"} == set(extra["measured"])
    # Of an even number of samples, ours is the geometric mean of the middle two, theirs the arithmetic.
    assert extra["measured"]["time_s"] == pytest.approx(entry["stats"]["median"], rel=0.05)
    assert extra["cold_s"] > 0
    assert extra["allocator"] == "default"
    assert by_name["second/insertion"]["extra_info"]["against"]["verdict"] == "slower"
    facts = results["machine_info"]["perflab"]
    assert facts["usable_cores"] >= 1
    assert "pytest" in facts["versions"]


def test_the_lab_section_holds_predictions_proofs_claims_and_reasons(results):
    lab = results["perflab"]["labs"]["tiny_lab"]
    assert lab["status"] == "done"
    rows = {(row["variant"], row["key"]): row for row in lab["predictions"]}
    inserted = rows.pop(("second/insertion", "inserted"))
    assert (inserted["measured"], inserted["verdict"], inserted["low"]) == (1000, "exact", None)
    assert set(rows) == {
        ("first/sorted", "time_s"),
        ("second/sorted", "time_s"),
        ("", "insertion_ratio"),
    }
    assert all(row["low"] < row["measured"] < row["high"] for row in rows.values())
    assert len(lab["checks"]) == 3
    assert all(check["passed"] for check in lab["checks"])
    assert [claim["verdict"] for claim in lab["claims"]] == ["holds"]
    assert lab["unavailable"] == [
        {"variant": "second/quantum", "reason": "there is no quantum computer here"}
    ]
    assert [figure["kind"] for figure in lab["figures"]] == ["bars"]
    assert lab["listings"] == [
        {"variant": f"{group}/sorted", "title": "program", "text": "sorted(numbers)"}
        for group in ("first", "second")
    ]


def test_the_original_pytest_benchmark_reads_the_file(finished_run):
    folder, _ = finished_run
    done = subprocess.run(
        [PERFLAB[0], "-m", "pytest_benchmark", "compare", str(folder / "results.json")],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "second/insertion" in done.stdout.replace("insertion/default", "second/insertion")


@pytest.mark.alone
def test_a_faulty_lab_is_reported_and_the_others_go_on(tmp_path, calibrated):
    faults = (
        *("raise", "late", "wrong", "exit", "claim", "predict", "variants", "derive", "figure", "count"),
    )
    names = [f"lab_{fault}" for fault in faults] + ["lab_good"]
    bring_labs(tmp_path, *names)
    for name in set(names) - {"lab_late", "lab_count"}:  # whose faults need many rounds
        text = (tmp_path / f"{name}.py").read_text()
        assert "seconds=0.5" in text
        (tmp_path / f"{name}.py").write_text(text.replace("seconds=0.5", "seconds=0.1"))
    planted = [word for fault in faults for word in ("--set", f"lab_{fault}.fault={fault}")]
    status, out, err = perflab("run", *names, "--quick", *planted, folder=tmp_path)
    assert status == 1, err
    labs = read(tmp_path / "results.json")["perflab"]["labs"]
    assert {name: lab["status"] for name, lab in labs.items()} == {
        "lab_raise": "failed",
        "lab_late": "failed",
        "lab_wrong": "done",
        "lab_exit": "failed",
        "lab_claim": "done",
        "lab_predict": "failed",
        "lab_variants": "failed",
        "lab_derive": "failed",
        "lab_figure": "failed",
        "lab_count": "done",
        "lab_good": "done",
    }
    assert "RuntimeError: planted" in labs["lab_raise"]["error"]
    assert "ArithmeticError: planted in predict" in labs["lab_predict"]["error"]
    assert "ended with status 9" in labs["lab_exit"]["error"]
    assert [check["variant"] for check in labs["lab_wrong"]["checks"] if not check["passed"]] == [
        "second/insertion"
    ]
    assert [claim["verdict"] for claim in labs["lab_claim"]["claims"]] == ["fails"]
    for part in ("variants", "derive", "figure"):
        assert f"{part}: ArithmeticError: planted in {part}" in labs[f"lab_{part}"]["error"]
    ways = {row["variant"] for group in labs["lab_late"]["groups"] for row in group["rows"]}
    assert ways == {"first/sorted", "second/sorted"}  # the sibling of what failed in a late round
    (inserted,) = (row for row in labs["lab_count"]["predictions"] if row["exact"])
    assert (inserted["measured"], inserted["verdict"]) == (999, "differs")  # in a few rounds, not the last
    for name in set(names) - {"lab_variants"}:  # what was measured before the fault is there
        assert any(group["group"] == "first" for group in labs[name]["groups"])
        assert labs[name]["claims"]
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == len(faults)
    assert not any("lab_good" in line for line in failed)


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def start_slow_run(folder, pause="0.25"):
    """A run whose first group is done soon and whose second takes long."""
    bring_labs(folder, "tiny_lab")
    return subprocess.Popen(
        [*BESIDE_OTHERS, "run", "tiny_lab", "--quick", "--set", f"pause={pause}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def first_group_done(folder):
    events = Journal(folder / "results.json.journal").events()
    return any(event["event"] == "group" and event["group"] == "first" for event in events)


def processes_in(folder):
    """Processes working in the folder: every descendant of a run there inherits it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_kill_9_loses_nothing_leaves_nothing_and_resume_goes_on(tmp_path, calibrated):
    """In a folder whose modules must not be taken for ours, by none of a run's processes."""
    for name in ("bench", "kernels", "parallel", "labs"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    run = start_slow_run(tmp_path)
    wait_for(lambda: first_group_done(tmp_path), 90, "the first group")
    time.sleep(0.3)  # into the second group
    run.kill()
    run.communicate(timeout=30)
    wait_for(lambda: not processes_in(tmp_path), 20, "every process of the run to end")
    assert not (tmp_path / "results.json").exists()
    events = list(Journal(tmp_path / "results.json.journal").events())
    kinds = [event["event"] for event in events]
    assert kinds.index("predictions") < kinds.index("started")  # predictions come before any measurement
    before = next(e["benchmark"]["stats"]["data"] for e in events if e["event"] == "variant")

    command = [*BESIDE_OTHERS, "run", "--resume", "--output", "results.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read(tmp_path / "results.json")
    assert results["perflab"]["labs"]["tiny_lab"]["status"] == "done"
    assert results["perflab"]["scale"] == "quick"
    after = {entry["extra_info"]["variant"]: entry["stats"]["data"] for entry in results["benchmarks"]}
    assert after["first/sorted"] == before  # not measured again
    assert "second/insertion" in after


@pytest.mark.proof
def test_ctrl_c_writes_what_is_there_and_says_how_to_go_on(tmp_path, calibrated):
    run = start_slow_run(tmp_path, pause="2")  # on a busy machine the group must still be under way
    wait_for(lambda: first_group_done(tmp_path), 90, "the first group")
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert b"--resume --output results.json" in err
    assert not processes_in(tmp_path)
    lab = read(tmp_path / "results.json")["perflab"]["labs"]["tiny_lab"]
    assert lab["status"] == "partial"
    assert [group["group"] for group in lab["groups"]] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rooflin"], "did you mean 'roofline'?"),
        (["numpy"], "no lab: it has no LAB"),
        (["tiny_lab", "--set", "item=3"], "did you mean 'items'?"),
        (["tiny_lab", "--set", "items=many"], "items takes int, not 'many'"),
        (["tiny_lab", "--set", "items=0"], "below the minimum of 1 numbers"),
        (["tiny_lab", "--set", "items=1000000000000"], "GiB of memory"),
        (["tiny_lab", "--set", "items"], "key=value"),
        (["tiny_lab", "--set", "fault=rais"], "did you mean 'raise'?"),
        (["tiny_lab", "--machine", "h20"], "did you mean 'h200'?"),
        (["tiny_lab", "--nproc", "2"], "none of tiny_lab runs a world"),
        (["tiny_lab", "--device", "tpu"], "cpu or cuda"),
        (["tiny_lab", "--quick", "--full"], "exclude"),
        (["tiny_lab", "--output", "no/such/results.json"], "there is no folder"),
        (["tiny_lab", "--output", "."], "is a folder"),
        (["tiny_lab", "--output", "results.html"], "over the results"),
        (["tiny_lab", "--output", "/proc/results.json"], "cannot be written"),
        (["tiny_lab", "--resume"], "there is no interrupted run"),
        (["--unknown"], "No such option"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, arguments, message, monkeypatch, capsys):
    from bench import cli

    bring_labs(tmp_path, "tiny_lab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["perflab", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"tiny_lab.py"}  # nothing was left or lost


def test_cuda_that_is_not_there_is_said_before_anything_runs(tmp_path, monkeypatch, run):
    bring_labs(tmp_path, "tiny_lab")
    monkeypatch.chdir(tmp_path)
    without = Machine("here", True, {})
    monkeypatch.setattr(runner, "calibrated", lambda progress: (without, "measured elsewhere"))
    status, out, err = run("run", "tiny_lab", "--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "perflab: --device cuda: torch finds no CUDA device here; use --device cpu\n"
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"tiny_lab.py"}


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_killed_again_and_again_a_run_still_ends_whole(tmp_path, calibrated):
    """kill -9 at random moments; every resumed run goes on, and each variant is measured just once."""
    moments = random.Random(0)
    bring_labs(tmp_path, "tiny_lab")
    first = ["run", "tiny_lab", "--quick", "--set", "pause=0.2"]
    seen = {}
    for attempt in range(12):
        started = any(Journal(tmp_path / "results.json.journal").events())
        command = ["run", "--resume", "--output", "results.json"] if started else first
        run = subprocess.Popen(
            [*PERFLAB, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(moments.uniform(0.5, 7.0))
        run.kill()
        run.communicate(timeout=30)
        wait_for(lambda: not processes_in(tmp_path), 20, f"the processes of attempt {attempt} to end")
        if (tmp_path / "results.json").exists():
            break
        for event in Journal(tmp_path / "results.json.journal").events():
            if event["event"] == "group":
                key = event["group"]
                assert seen.setdefault(key, event["at"]) == event["at"], f"{key} was measured twice"
    else:
        status, _, err = perflab("run", "--resume", "--output", "results.json", folder=tmp_path)
        assert status == 0, err
    results = read(tmp_path / "results.json")
    names = [entry["extra_info"]["variant"] for entry in results["benchmarks"]]
    assert sorted(names) == ["first/sorted", "second/insertion", "second/sorted"]
    assert results["perflab"]["labs"]["tiny_lab"]["status"] == "done"


def test_two_runs_into_one_file_are_refused(tmp_path, monkeypatch, run):
    import fcntl

    bring_labs(tmp_path, "tiny_lab")
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "results.json.journal", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # which holds against another opening of this process, too
        status, _, err = run("run", "tiny_lab")
    assert status == 2
    assert "another run is writing" in err


class Child:
    """A child process of the runner's that never measures: it ends at once with a status, or never."""

    def __init__(self, status):
        self.status, self.ended, self.started = status, False, 0

    def __call__(self, command, environment, log):
        self.started += 1
        with open(log, "w") as file:
            file.write("E   RuntimeError: planted in a fixture\n1 error in 0.1 s\n")
        return self

    def poll(self):
        return self.status

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("status", "children"), [(0, 1), (1, 1), (3, 2)])
def test_groups_that_a_child_never_began_are_lost_and_said(tmp_path, monkeypatch, status, children):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    child = Child(status)
    monkeypatch.setattr(runner, "Supervised", child)
    request = Request(("tiny_lab",), "quick", output=tmp_path / "results.json")
    journal = Journal(tmp_path / "journal")
    runner.measure(journal, settings_of(request), request, Progress(show=False))
    lost = [event for event in journal.events() if event["event"] == "lost"]
    assert [event["group"] for event in lost] == ["first", "second"]
    assert all("planted in a fixture" in event["error"] for event in lost)
    assert child.started == children


def plan_of(folder, request):
    """The journal of a run that was interrupted at once."""
    path = runner.journal_path(folder / "results.json")
    runner._predict(Journal(path), request, settings_of(request), Machine("here", True, {}), [], "")
    return path


@pytest.mark.parametrize(
    ("again", "option"),
    [
        ({"labs": ("tiny_lab",)}, "choice of labs"),
        ({"scale": "full"}, "size"),
        ({"overrides": {"items": "7"}}, "--set"),
        ({"device": "cpu"}, "--device"),
        ({"sheets": ("h200",)}, "--machine"),
        ({"processes": 3}, "--nproc"),
    ],
)
def test_resume_refuses_to_change_what_was_started(tmp_path, monkeypatch, again, option):
    bring_labs(tmp_path, "tiny_lab", "other_lab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    started = Request(("tiny_lab", "other_lab"), "quick", {"other_lab.items": "10"})
    path = plan_of(tmp_path, started)
    _, request = runner._resumed(path, Request(resume=True))
    assert settings_of(request) == settings_of(started)
    assert settings_of(request)["other_lab"]["items"] == 10
    with pytest.raises(
        ValueError, match=rf"not with another {option}: perflab run --resume --output"
    ) as said:
        runner._resumed(path, Request(resume=True, output="results.json", **again))
    assert "run tiny_lab other_lab --quick --set other_lab.items=10)" in str(said.value)


def test_the_command_of_each_lab_runs_it_alone_and_in_a_shell(tmp_path, monkeypatch):
    bring_labs(tmp_path, "tiny_lab", "other_lab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = {"other_lab.items": "10", "pause": "0.1", "tiny_lab.fault": "it's"}
    request = Request(("tiny_lab", "other_lab"), "quick", overrides, sheets=("h200",))
    settings = {"tiny_lab": {"items": 1, "pause": 1, "fault": ""}, "other_lab": {"items": 1, "pause": 1}}
    mine, other = (runner._command(request, [name], settings) for name in settings)
    assert shlex.split(mine) == [
        *("perflab", "run", "tiny_lab", "--quick", "--set", "pause=0.1"),
        *("--set", "tiny_lab.fault=it's", "--machine", "h200"),
    ]
    assert other == ("perflab run other_lab --quick --set other_lab.items=10 --set pause=0.1 --machine h200")


def test_a_calibration_that_hangs_is_ended_and_said(monkeypatch, run):
    child = Child(None)
    monkeypatch.setattr(calibrating, "Supervised", child)
    monkeypatch.setattr(calibrating, "SILENCE_SECONDS", 0.2)
    status, _, err = run("calibrate", "--json")
    assert status == 1
    assert err == "perflab: calibration failed: no sign of life for 0 s: 1 error in 0.1 s\n"
    assert child.ended


def test_a_home_that_cannot_be_written_is_wrong_input(monkeypatch, run):
    monkeypatch.setenv("PERFLAB_HOME", "/proc/perflab")
    status, _, err = run("calibrate", "--json")
    assert status == 2
    assert "set PERFLAB_HOME to a folder" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "fault", [lambda path: int("soon"), lambda path: len(path, 3), lambda path: np.zeros(3).reshape(2, 2)]
)
def test_a_fault_of_ours_is_not_called_wrong_input(monkeypatch, fault):
    from bench import cli

    monkeypatch.setattr("bench.results.load", fault)
    monkeypatch.setattr("sys.argv", ["perflab", "report", "results.json"])
    with pytest.raises((ValueError, TypeError)):  # whose traceback Python prints, with status 1
        cli.main()


def test_what_a_lab_of_the_folder_says_of_its_settings_is_wrong_input(tmp_path, monkeypatch, run):
    bring_labs(tmp_path, "odd_lab")
    text = (tmp_path / "odd_lab.py").read_text()
    check = "\n    def __post_init__(self):\n        raise ValueError('items must be odd')\n\n"
    (tmp_path / "odd_lab.py").write_text(text.replace("\n\ndef _list", f"{check}\n\ndef _list"))
    monkeypatch.chdir(tmp_path)
    status, _, err = run("run", "odd_lab", "--quick")
    assert (status, err) == (2, "perflab: items must be odd\n")
