"""Hazards end: what hangs is killed with all it started, what dies or finishes says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from left_running import left_running, runs

from labs.concurrency import hazards
from labs.concurrency.hazards import Scenario, run_hazards

QUIET = Scenario("quiet", "ends at once", "finished", "nothing", (), "print('ready', flush=True)", {})


def outcome(program: str, timeout: float = 1.0) -> hazards.Hazard:
    (found,) = run_hazards(timeout, [replace(QUIET, program=program)])
    return found


def test_what_ends_is_said_to_have_finished() -> None:
    found = outcome(QUIET.program)
    assert (found.outcome, found.verdict) == ("finished", "finished")
    assert 0 <= found.seconds < 1


def test_exit_codes_and_signals_are_told_apart() -> None:
    assert outcome(QUIET.program + "\nraise SystemExit(3)").outcome == "died with exit code 3"
    found = outcome("import os\n" + QUIET.program + "\nos.abort()")
    assert (found.outcome, found.verdict) == ("died with signal SIGABRT", "died")


def test_ready_may_arrive_in_pieces() -> None:
    program = "import os, time\nfor c in b'ready\\n':\n os.write(1, bytes([c])); time.sleep(0.05)"
    assert outcome(program, 10.0).outcome == "finished"  # which is not waited for


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_hang_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    program = (
        "import os, time\nprint('ready', flush=True)\nchild = os.fork()\n"
        f"if child: open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{child}}')\ntime.sleep(60)"
    )
    found = outcome(program, 0.7)
    assert found.verdict == "hung"
    assert found.outcome == f"hung, ended after {found.seconds:.1f} s"
    assert 0.7 <= found.seconds < 3
    assert not left_running([int(pid) for pid in note.read_text().split()], 5.0)


@pytest.mark.proof
def test_scenarios_run_side_by_side() -> None:
    sleeper = QUIET.program + "\nimport time; time.sleep(60)"
    begin = time.monotonic()
    found = run_hazards(1.0, [replace(QUIET, name=str(index), program=sleeper) for index in range(3)])
    assert [hazard.name for hazard in found] == ["0", "1", "2"]
    assert all(hazard.verdict == "hung" for hazard in found)
    assert time.monotonic() - begin < 2.9  # three after one another would take more


def test_silence_and_a_missing_library_are_not_counted_as_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hazards, "IMPORT_S", 0.5)
    assert outcome("import time; time.sleep(60)").verdict == "not run"
    (found,) = run_hazards(1.0, [replace(QUIET, modules=("a_library_that_is_not_there",))])
    assert found.outcome == "not run: a_library_that_is_not_there is not installed"
    assert found.seconds == 0


def test_a_time_limit_must_be_positive() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            run_hazards(wrong)


@pytest.mark.proof
def test_the_known_hazards_behave_or_are_mended() -> None:
    """On today's libraries each hangs or dies; one that finishes was repaired."""
    found = run_hazards(2.5)
    assert [hazard.name for hazard in found] == [scenario.name for scenario in hazards.SCENARIOS]
    for hazard in found:
        assert hazard.verdict in (hazard.expected, "finished", "not run"), hazard
        if hazard.verdict == "hung":
            assert 2.5 <= hazard.seconds < 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_runner_leaves_no_hung_process(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    use = f"open({str(note)!r}, 'w').write(f'{{os.getppid()}} {{os.getpid()}}'); __import__('time').sleep(60)"
    scenario = replace(QUIET, program=hazards._FORK.format(use=use))
    runner = subprocess.Popen(
        [sys.executable, "-c", f"from labs.concurrency.hazards import *\nrun_hazards(50, [{scenario!r}])"],
        cwd=Path(__file__).parents[2],
    )
    end = time.monotonic() + 20
    while not (note.exists() and note.read_text().count(" ")) and time.monotonic() < end:
        time.sleep(0.02)
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2
    assert all(runs(pid) for pid in pids)
    runner.kill()
    runner.wait(10)
    assert not left_running(pids, 5.0)
