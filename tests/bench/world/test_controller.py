"""A world's controller: whose error it names, how long it waits, and which world it asks no more."""

import threading
import time

import psutil
import pytest

from bench.world import protocol
from bench.world.controller import World

RAISED = {"error": "ValueError: planted (job.py:1)"}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(protocol, "GRACE_SECONDS", 0.4)


def refused(world):
    """What the world says to a command, within a moment."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="of no more use") as caught:
        world.call("a/b")
    assert time.monotonic() - start < 0.2
    return str(caught.value)


def test_a_ranks_error_is_named_while_another_hangs(played, quick):
    world = World(2, answer_seconds=60.0)
    played.answers = {"call": {0: None, 1: RAISED}}
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2: ValueError: planted .*; then .* from rank 0$"):
        world.call("a/b")
    assert 0.4 <= time.monotonic() - start < 5
    assert "rank 1 of 2: ValueError: planted" in refused(world)
    world.tear_down("a/b")
    assert played.seen == ["hello", "call"]  # nothing was sent to a broken world


def test_an_error_on_some_ranks_breaks_the_world(played, quick):
    world = World(2)
    played.answers = {"set_up": {1: RAISED}}
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2: ValueError: planted \(job.py:1\)$"):
        world.set_up("lab", {}, "a/b")
    assert "'set_up' a/b failed" in refused(world)


def test_different_errors_are_all_named_and_break_the_world(played, quick):
    world = World(2)
    played.answers = {"call": {0: {"error": "TypeError: other"}, 1: RAISED}}
    with pytest.raises(RuntimeError, match=r"^rank 0 of 2: TypeError: other; rank 1 of 2: ValueError"):
        world.call("a/b")
    assert world.broken


def test_the_same_error_on_all_ranks_leaves_the_world_whole(played, quick):
    world = World(2)
    played.answers = {"call": {0: RAISED, 1: RAISED}}
    with pytest.raises(RuntimeError, match=r"^rank 0 of 2: ValueError: planted \(job.py:1\)$"):
        world.call("a/b")
    assert not world.broken
    world.set_up("lab", {}, "a/b")


def test_who_did_not_answer_is_named_alone(played):
    world = World(2, answer_seconds=0.5)
    played.answers = {"call": {1: None}}
    with pytest.raises(TimeoutError, match=r"waits for rank 1 of 2 to answer 'call' a/b: nothing within 0 s"):
        world.call("a/b")
    assert "'call' a/b ended with TimeoutError" in refused(world)


def test_a_command_that_was_interrupted_breaks_the_world(played, monkeypatch):
    world = World(2)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world, "_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.call("a/b")
    assert "KeyboardInterrupt" in refused(world)


def test_a_store_that_is_gone_ends_the_command_at_once(played):
    world = World(2, answer_seconds=60.0)
    played.stop()
    threading.Timer(0.5, setattr, [played, "store", None]).start()  # which ends its server
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the world that torchrun started ended during 'call' a/b"):
        world.call("a/b")
    assert 0.4 < time.monotonic() - start < 5
    assert world.broken


def test_torchruns_ranks_stay_broken_for_the_next_process_that_measures(played, quick):
    played.answers = {"call": {1: RAISED}}
    with pytest.raises(RuntimeError, match="planted"):
        World(2).call("a/b")
    with pytest.raises(RuntimeError, match=r"of no more use since 'call' a/b failed: rank 1 of 2: .*planted"):
        World(2)
    assert played.seen == ["hello", "call"]


def test_torchrun_must_have_started_as_many(played):
    with pytest.raises(ValueError, match="runs on 3 ranks, but torchrun started 2; use --nproc-per-node 3"):
        World(3)


def test_ranks_that_do_not_say_hello_are_ended(monkeypatch):
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(protocol, "START_SECONDS", 0.3)
    with pytest.raises(TimeoutError, match="waits for ranks 0, 1 of 2 to answer 'hello'"):
        World(2)
    assert not set(psutil.Process().children(recursive=True)) - before


def test_ranks_do_not_take_a_module_of_the_folder_for_ours(monkeypatch, tmp_path):
    (tmp_path / "bench.py").write_text("raise SystemExit('the wrong bench')")
    monkeypatch.chdir(tmp_path)
    world = World(1)
    assert not world.broken  # its rank has answered
    world.close()
