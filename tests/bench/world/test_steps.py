"""Steps on the ranks of a real world: slowest rank's time, errors and hangs that name the rank."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bench import measure
from bench.plugin import Paired
from bench.world import protocol
from bench.world.steps import WorldClock, Worlds, WorldStep
from labs import load
from labs.lab import Lab, Prediction, Variant


@pytest.fixture(scope="module")
def worlds(beside_world_job):
    before = set(psutil.Process().children(recursive=True))
    kept = Worlds()
    yield kept
    kept.close()
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.fixture
def world(worlds):
    return worlds.of_size(2)


def test_every_rank_runs_the_step_and_rank_0_answers(world):
    step = WorldStep(world, "", {}, "world_job:reduce_small")
    assert np.array_equal(step(), np.full(1000, 3.0))
    assert 1e-6 < WorldClock().sample(step, 10) < 1.0
    step.close()


def test_a_sample_is_the_slowest_ranks_time(world):
    step = WorldStep(world, "", {}, "world_job:late_rank")
    assert 0.03 <= step.sample(2) < 0.2


def test_what_rank_0_records_arrives_a_round_at_a_time(world):
    step = WorldStep(world, "recording_lab", {}, "ranks/record")
    assert step.recorded == {"rank": [0.0]}
    step()
    assert step.recorded == {"rank": [0.0], "call": [1.0]}
    step.sample(2)
    step.close()
    assert step.recorded == {"rank": [0.0], "call": [2.0, 3.0]}
    assert step.texts == {"who": "rank 0"}


def test_what_ranks_record_is_kept_of_each_round(worlds):
    lab, address = load("recording_lab"), "ranks/record"
    wanted = {address: [Prediction(address, name, 1.0, "") for name in ("call", "rank")]}
    found = measure.measure_group(
        lab, lab.config(), "ranks", budget_seconds=0.3, predictions=wanted, worlds=worlds
    )
    (measured,) = found.measured
    by_round = measured.extra_info["by_round"]
    assert by_round.keys() == {"call"}  # the rank was recorded once, in the setup
    assert len(by_round["call"]) == len(measured.timed.seconds) >= 3
    assert by_round["call"] == sorted(set(by_round["call"]))
    assert measured.extra_info["measured"]["rank"] == 0.0


def test_an_error_of_all_ranks_is_one_and_the_world_goes_on(worlds, world):
    step = WorldStep(world, "", {}, "world_job:raises_everywhere")
    with pytest.raises(RuntimeError, match=r"rank 0 of 2: ValueError: planted on every rank"):
        step()
    with pytest.raises(RuntimeError, match="rank 0 of 2: AttributeError"):
        WorldStep(world, "", {}, "world_job:nothing")
    assert worlds.of_size(2) is world
    assert WorldStep(world, "", {}, "world_job:reduce_small")() is not None


def test_functions_of_which_one_raises_are_all_torn_down(worlds, request, monkeypatch):
    """The short form of the fixture ``paired`` on ranks (``tests/bench/test_plugin.py``)."""
    paired = Paired(request, SimpleNamespace(disabled=False, _mode=""))
    monkeypatch.setattr(paired, "_worlds", lambda: worlds)
    with pytest.raises(RuntimeError, match="planted"):
        paired(base="world_job:Good", new="world_job:Bad", processes=2, seconds=0.2)
    assert WorldStep(worlds.of_size(2), "", {}, "world_job:closed")() == 2


def test_an_error_before_a_collective_is_named_and_the_next_step_has_a_new_world(worlds, world, monkeypatch):
    monkeypatch.setattr(protocol, "GRACE_SECONDS", 0.5)
    step = WorldStep(world, "", {}, "world_job:raises_before_a_reduction")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: ValueError: planted on rank 1 .* from rank 0"):
        step()
    step.close()
    assert time.monotonic() - start < 10
    assert WorldStep(worlds.of_size(2), "", {}, "world_job:reduce_small")() is not None


def test_a_hang_ends_with_who_waits_for_whom(world):
    step = WorldStep(world, "", {}, "world_job:hangs")
    world.answer_seconds = 1.0
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"waits for rank 1 of 2 to answer 'call' world_job:hangs"):
        step()
    assert time.monotonic() - start < 10


def test_a_broken_world_of_torchruns_is_not_replaced(played):
    worlds = Worlds()
    world = worlds.of_size(2)
    played.answers = {"call": {1: {"error": "ValueError: planted"}}}
    with pytest.raises(RuntimeError, match="planted"):
        world.call("a/b")
    assert worlds.of_size(2) is world
    worlds.close()


@dataclass(frozen=True)
class Config:
    pass


def group(*names):
    """A lab of one group of variants that run on two ranks; what they do is played."""
    return Lab(
        *("mine", "?", "!", Config),
        variants=lambda config: [Variant("group", name, None, processes=2) for name in names],
        check=lambda config, outputs: [],
    )


def measured(**options):
    return measure.measure_group(group("first", "bad"), Config(), "group", budget_seconds=0.2, **options)


def test_each_variant_of_a_broken_world_says_so_at_once(played):
    played.answers = {"call group/bad": {1: {"error": "ValueError: planted"}}}
    start = time.monotonic()
    result = measured(worlds=Worlds())
    assert time.monotonic() - start < 5
    assert result.errors["group/bad"].startswith("RuntimeError: rank 1 of 2: ValueError: planted")
    assert "of no more use since 'call' group/bad failed: rank 1 of 2" in result.errors["group/first"]


def test_a_world_that_breaks_after_the_rounds_takes_no_result_along(played):
    played.answers = {"tear_down group/first": {1: {"error": "ValueError: planted"}}}
    result = measured(worlds=Worlds())
    assert list(result.errors) == ["group/first"]  # and not that the other could not be torn down
    assert [len(each.timed.seconds) >= 3 for each in result.measured] == [True, True]


def test_worlds_that_a_group_was_not_given_end_with_it(played, monkeypatch):
    closed = []

    class Watched(Worlds):
        def close(self):
            closed.append(len(self._worlds))
            super().close()

    monkeypatch.setattr(measure, "Worlds", Watched)
    assert not measured().errors
    assert closed == [1]
