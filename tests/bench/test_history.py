"""The history of a machine: what is kept, and in which order."""

import json

import pytest

from bench import history


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keeps results of a run that began in this second of a day; its file's name."""
    monkeypatch.setattr(history, "folder", lambda: tmp_path)

    def keep(second, labs=("a",)):
        started = f"2026-11-27T10:00:{second:02}+00:00"
        results = {"benchmarks": [], "machine_info": {}, "perflab": {"labs": list(labs), "started": started}}
        return history.keep(results).name

    return keep


def test_runs_that_begin_in_one_second_stay_in_order(keep):
    names = [keep(5) for _ in range(12)]
    assert names[0] == "20261127T100005_a.json"
    assert names[-1] == "20261127T100005-12_a.json"
    assert [path.name for path in history.last(3, "a")] == names[-3:]
    later = keep(6, ("a", "b"))
    assert [path.name for path in history.last(2, "a")] == [names[-1], later]


def test_of_many_runs_the_oldest_go(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "KEPT", 3)
    names = [keep(5) for _ in range(12)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[-3:])


def test_what_is_damaged_is_passed_over(keep, tmp_path):
    names = [keep(second) for second in range(3)]
    (tmp_path / names[2]).write_text(json.dumps({})[:-1])
    assert [path.name for path in history.last(2, "a")] == names[:2]


def test_runs_of_other_labs_in_one_second_stay_in_order_too(keep):
    first, second, third = keep(5, ("b", "a")), keep(5, ("a",)), keep(5, ("b", "a"))
    assert [path.name for path in history.last(3, "a")] == [first, second, third]
