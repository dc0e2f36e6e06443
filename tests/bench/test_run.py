"""``perflab run``: one command predicts, measures, proves and reports, whatever goes wrong on the way."""

import os
import random
import signal
import subprocess
import time

import psutil
import pytest
from command import PERFLAB, bring_labs, perflab, read

from bench.journal import Journal


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
    assert extra["peak_memory_B"] > 1e6
    assert extra["allocator"] == "default"
    assert by_name["second/insertion"]["extra_info"]["against"]["verdict"] == "slower"
    facts = results["machine_info"]["perflab"]
    assert facts["usable_cores"] >= 1
    assert "pytest" in facts["versions"]


def test_the_lab_section_holds_predictions_proofs_claims_and_reasons(results):
    lab = results["perflab"]["labs"]["tiny_lab"]
    assert lab["status"] == "done"
    assert {row["variant"] for row in lab["predictions"]} == {"first/sorted", "second/sorted"}
    assert all(row["measured"] and row["low"] <= row["measured"] <= row["high"] for row in lab["predictions"])
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


def test_a_faulty_lab_is_reported_and_the_others_go_on(tmp_path):
    faults = ("raise", "wrong", "exit", "claim", "predict")
    names = [f"lab_{fault}" for fault in faults] + ["lab_good"]
    bring_labs(tmp_path, *names)
    planted = [word for fault in faults for word in ("--set", f"lab_{fault}.fault={fault}")]
    status, out, err = perflab("run", *names, "--quick", *planted, folder=tmp_path)
    assert status == 1, err
    labs = read(tmp_path / "results.json")["perflab"]["labs"]
    assert {name: lab["status"] for name, lab in labs.items()} == {
        "lab_raise": "failed",
        "lab_wrong": "done",
        "lab_exit": "failed",
        "lab_claim": "done",
        "lab_predict": "failed",
        "lab_good": "done",
    }
    assert "RuntimeError: planted" in labs["lab_raise"]["error"]
    assert "ArithmeticError: planted in predict" in labs["lab_predict"]["error"]
    assert "ended with status 9" in labs["lab_exit"]["error"]
    assert [check["variant"] for check in labs["lab_wrong"]["checks"] if not check["passed"]] == [
        "second/insertion"
    ]
    assert [claim["verdict"] for claim in labs["lab_claim"]["claims"]] == ["fails"]
    for name in names:  # what was measured before the fault is there
        assert any(group["group"] == "first" for group in labs[name]["groups"])
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 5
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
        [*PERFLAB, "run", "tiny_lab", "--quick", "--set", f"pause={pause}"],
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


def test_kill_9_loses_nothing_leaves_nothing_and_resume_goes_on(tmp_path):
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

    status, _, err = perflab("run", "--resume", "--output", "results.json", folder=tmp_path)
    assert status == 0, err
    results = read(tmp_path / "results.json")
    assert results["perflab"]["labs"]["tiny_lab"]["status"] == "done"
    assert results["perflab"]["scale"] == "quick"
    after = {entry["extra_info"]["variant"]: entry["stats"]["data"] for entry in results["benchmarks"]}
    assert after["first/sorted"] == before  # not measured again
    assert "second/insertion" in after


@pytest.mark.proof
def test_ctrl_c_writes_what_is_there_and_says_how_to_go_on(tmp_path):
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


def test_cuda_that_is_not_there_is_said_before_anything_runs(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    bring_labs(tmp_path, "tiny_lab")
    status, out, err = perflab("run", "tiny_lab", "--device", "cuda", folder=tmp_path)
    assert status == 2
    assert err.splitlines()[-1].startswith("perflab: --device cuda: torch finds no CUDA device here")
    assert out == ""
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"tiny_lab.py"}


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_killed_again_and_again_a_run_still_ends_whole(tmp_path):
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


def test_two_runs_into_one_file_are_refused(tmp_path):
    import fcntl

    bring_labs(tmp_path, "tiny_lab")
    with open(tmp_path / "results.json.journal", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        status, _, err = perflab("run", "tiny_lab", folder=tmp_path)
    assert status == 2
    assert "another run is writing" in err
