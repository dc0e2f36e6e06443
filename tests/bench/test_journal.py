"""The journal keeps every complete line, whatever happened to the last one."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.journal import Journal


def test_events_come_back_in_order_and_numpy_is_plain(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.write("a", value=np.float64(1.5), values=np.arange(3))
    journal.write("b")
    first, second = journal.events()
    assert (first["event"], first["value"], first["values"]) == ("a", 1.5, [0, 1, 2])
    assert (second["event"], first["at"] <= second["at"]) == ("b", True)


def test_what_cannot_be_written_is_refused_and_harms_nothing(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.write("a")
    with pytest.raises(TypeError, match="cannot write"):
        journal.write("b", value=object())
    assert [event["event"] for event in journal.events()] == ["a"]


@given(cut=st.integers(0, 200))
def test_cut_anywhere_the_complete_lines_survive_and_writing_goes_on(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal(path)
    for number in range(5):
        journal.write("n", number=number, text="é" * number)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    complete = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    assert list(journal.events()) == complete
    journal.write("after")
    survived = [event for event in journal.events() if event["event"] != "after"]
    assert survived[: len(complete)] == complete
    assert list(journal.events())[-1]["event"] == "after"


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    journal = Journal(tmp_path / "journal")
    journal.write("a", text="é" * 20)
    journal.write("b")
    assert [event["event"] for event in journal.events()] == ["a", "b"]


def test_a_reader_follows_a_running_journal(tmp_path):
    journal = Journal(tmp_path / "journal")
    offset, events = journal.events_from(0)
    assert (offset, events) == (0, [])
    journal.write("a")
    offset, events = journal.events_from(offset)
    assert [event["event"] for event in events] == ["a"]
    assert journal.events_from(offset) == (offset, [])
