"""Reports come from strangers: whatever is damaged in one, it is read or refused in one line."""

import json
import random
import zlib

import damage
import pytest
import samples

from bench.traces.job_report import examine, sentence, to_json
from bench.traces.load import load


def read_damaged(path, name, seed):
    """Load one damaged file; what is neither a trace nor a line of ValueError goes through."""
    chance = random.Random(seed)
    kind = damage.of_values if chance.random() < 0.6 else damage.of_bytes
    path.write_bytes(kind(damage.WHOLE[name], chance))
    try:
        job = load(path)
    except ValueError as error:
        message = str(error)
        assert str(path) in message, f"which file? {message}"
        assert "\n" not in message
        return "refused"
    (trace,) = job.traces
    events = trace.events
    assert (events.duration >= 0).all()
    assert (events.start >= 0).all()
    assert ((events.name >= 0) & (events.name < len(trace.names))).all()
    assert ((events.lane >= 0) & (events.lane < len(trace.lanes))).all()
    assert (events.shape < len(trace.shapes)).all()
    assert (events.group < len(trace.groups)).all()
    assert all(count > 0 for count in trace.dropped.values()), trace.dropped
    for text in (*trace.names, *trace.shapes, *trace.groups, *(lane.process for lane in trace.lanes)):
        text.encode()  # half a surrogate pair could not be printed
    report = examine(job)
    json.dumps(to_json(report), allow_nan=False)
    assert sentence(report)
    return "read"


def seeds(count):
    """The same damages at every run: a seed for each file, different for each format."""
    names = sorted(damage.WHOLE)
    return [(names[index % len(names)], zlib.crc32(f"{index}".encode())) for index in range(count)]


def run(tmp_path, count):
    outcomes = {"read": 0, "refused": 0}
    for name, seed in seeds(count):
        path = tmp_path / samples.SAMPLES[name][0]
        try:
            outcomes[read_damaged(path, name, seed)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
    return outcomes


def test_two_hundred_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    outcomes = run(tmp_path, 200)
    assert min(outcomes.values()) > 40, outcomes  # the damages are such that both happen


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_ten_thousand_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    outcomes = run(tmp_path, 10_000)
    assert min(outcomes.values()) > 1000, outcomes
