"""Before a lab the machine's speed is checked: predictions go with what has changed."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from stated import machine as stated

from bench.assemble import _speed_notes
from bench.journal import Journal
from bench.progress import Progress
from bench.suites import test_labs as suite
from labs import calibration_anchors
from labs.lab import Prediction


def predict(config, machine):
    return [Prediction("group/way", "time_s", 1e6 * machine["python_operation_s"], "a million operations")]


LAB = SimpleNamespace(name="stated", predict=predict)


@pytest.fixture
def journal(tmp_path):
    kept = Journal(tmp_path / "journal")
    kept.write("predictions", lab="stated", column="default", predictions=[asdict(predict(None, MACHINE)[0])])
    return kept


MACHINE = stated(python_operation_s=1e-13)  # no machine is as fast


def test_a_slower_machine_is_predicted_with_and_said(journal):
    suite._check_speed(LAB, None, MACHINE, journal)
    (now,) = suite._predictions(LAB, None, MACHINE, journal)
    assert now.value > 100 * predict(None, MACHINE)[0].value
    (note,) = _speed_notes(list(journal.events()))
    assert note.startswith(
        "measured again before each lab, which predicts with what it found: the interpreter"
    )
    before = len(list(journal.events()))
    suite._check_speed(LAB, None, MACHINE, journal)
    assert len(list(journal.events())) == before, "once a lab and process"


def test_a_machine_that_runs_as_calibrated_changes_nothing(journal, monkeypatch):
    monkeypatch.setattr(calibration_anchors, "speeds", lambda machine, asked: {})
    suite._check_speed(LAB, None, MACHINE, journal)
    events = list(journal.events())
    assert [event["event"] for event in events] == ["predictions", "phase", "speed"]
    assert events[-1]["speeds"] == {}
    assert _speed_notes(events) == []


def test_a_run_killed_within_the_check_checks_again(journal):
    suite._check_speed(LAB, None, MACHINE, journal)
    *kept, last = journal.path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["event"] for line in (*kept, last)] == [
        "predictions",
        "phase",
        "predictions",
        "speed",
    ]
    journal.path.write_bytes(b"".join(kept))
    suite._check_speed(LAB, None, MACHINE, journal)
    assert list(journal.events())[-1]["event"] == "speed"


def test_what_is_partly_measured_keeps_what_was_predicted_of_it(journal):
    journal.write("variant", lab="stated", column="default", variant="group/other")
    before = list(journal.events())
    suite._check_speed(LAB, None, MACHINE, journal)
    assert list(journal.events()) == before


def test_a_check_that_fails_leaves_the_first_predictions_and_is_said(journal, monkeypatch, capsys):
    def broken(machine, asked):
        raise OSError("no clock")

    monkeypatch.setattr(calibration_anchors, "speeds", broken)
    suite._check_speed(LAB, None, MACHINE, journal)
    assert suite._predictions(LAB, None, MACHINE, journal)[0].value == predict(None, MACHINE)[0].value
    events = list(journal.events())
    (note,) = _speed_notes(events)
    assert note.startswith("stated (default) predicts with the constants as they are")
    assert "no clock" in note
    Progress().event(events[-1])
    assert "could not be checked: OSError: no clock" in capsys.readouterr().err
