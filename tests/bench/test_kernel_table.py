"""The table of kernels: the fastest peer is the one that counts, and every line is shown, won or lost."""

import time
from collections import Counter

import pytest
import torch

from bench.stats import Comparison
from bench.suites import test_kernels
from bench.suites.kernel_table import Row, render
from bench.suites.test_kernels import _contenders
from kernels.copy import rewrite
from kernels.spec import Benchmark, benchmarks


@pytest.fixture(scope="module")
def every_line():
    return benchmarks()  # with inputs of all sizes: seconds


def line(target=1.3, flops=0):
    return Benchmark("layer_norm", "forward", "8x8", torch.float32, dict, 512, flops, target)


def row(ratio, target=1.3, width=0.02, peak=None, held=None, **more):
    against = {
        "slow peer": Comparison(9.0, 8.9, 9.1, "slower"),
        "peer": Comparison(ratio, ratio - width, ratio + width, "slower"),
    }
    medians = {"kernels": 1e-3, "slow peer": 9e-3, "peer": ratio * 1e-3, "limit": 8e-4}
    return Row.of(line(target, **more), "tuned", medians, against, {"hopeless peer": 7.4}, peak, held)


def test_the_fastest_peer_counts():
    found = row(1.5)
    assert (found.peer, found.speedup, found.fraction) == ("peer", 1.5, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("ratio", "target", "width", "verdict"),
    [
        (1.5, 1.3, 0.02, "met"),
        (1.1, 1.3, 0.02, "missed"),
        (1.31, 1.3, 0.1, "undecidable"),
        (1.29, 1.3, 0.1, "undecidable"),
        (1.2, None, 0.02, "faster"),
        (0.9, None, 0.02, "slower"),
        (1.01, None, 0.02, "undecidable"),
    ],
)
def test_a_verdict_is_about_the_interval(ratio, target, width, verdict):
    assert row(ratio, target, width).verdict == verdict


def test_lost_lines_are_shown_as_well():
    text = render([row(1.5), row(0.5), row(1.0, flops=10**6)], 130)
    assert "0.50" in text
    assert "missed" in text
    assert "80% of a copy" in text
    assert "1 GFLOP/s" in text


def test_the_limit_that_is_nearest_is_shown_and_what_is_held():
    assert row(1.5, flops=10**6, peak=2e9).of_limit == "80% of a copy"
    assert row(1.5, flops=10**6, peak=1.1e9).of_limit == "91% of the FLOP/s"
    assert row(1.5, flops=10**6).of_limit == ""  # the copy alone says nothing about a product
    held = {"kernels": 40 << 20, "peer": 250 << 20, "slow peer": 1}
    assert row(1.5, held=held).memory == "40 MiB against 250 MiB"
    assert row(1.5).memory == ""


def test_a_pass_in_place_is_the_limit_of_what_is_updated_in_place(every_line):
    for item in every_line:
        assert (item.rewritten > 0) == item.operation.startswith(("Ada", "SGD")), item.name
    source, targets = torch.rand(40_000), torch.rand(3, 40_000)
    expected = targets + source
    rewrite(source, targets)
    assert torch.equal(targets, expected)


def test_a_peer_that_was_not_timed_is_named():
    assert "7x faster than hopeless peer" in render([row(1.5)], 130)


def test_a_peer_several_times_slower_than_another_is_not_timed():
    calls = {"fast": 0, "slow": 0, "near": 0}

    def peer(name, seconds):
        def step():
            calls[name] += 1
            time.sleep(seconds)

        return step

    kept, left_out = _contenders(
        {"fast": peer("fast", 0.02), "slow": peer("slow", 0.3), "near": peer("near", 0.03)}
    )
    assert list(kept) == ["fast", "near"]
    assert left_out.keys() == {"slow"}
    assert left_out["slow"] > 4
    assert calls["slow"] == 2


def test_a_peer_far_behind_is_called_once_unless_it_compiles_and_not_again_in_the_other_column(monkeypatch):
    monkeypatch.setattr(test_kernels, "LONG", 0.2)
    calls = Counter()

    def peer(name, *seconds):
        def step():
            calls[name] += 1
            time.sleep(seconds[min(calls[name], len(seconds)) - 1])

        return step

    peers = {
        "fast": peer("fast", 0.005),
        "torch.compile": peer("torch.compile", 0.3, 0.005),
        "far": peer("far", 0.6),  # far enough also where a busy machine makes five milliseconds 25
    }
    kept, left_out = _contenders(peers)
    assert list(kept) == ["fast", "torch.compile"]
    assert calls["far"] == 1
    assert left_out["far"] > 20
    assert _contenders(peers, left_out | {"fast": 5.0}) == (kept, {})  # who was near is tried again
    assert calls["far"] == 1


def test_no_peer_is_left_out_for_one_slow_call():
    seconds = [0.9, 0.3, 0.02]  # compiles, is interrupted, and is as fast as the other

    def interrupted():
        time.sleep(seconds.pop(0) if seconds else 0.02)

    kept, left_out = _contenders({"fast": lambda: time.sleep(0.02), "interrupted": interrupted})
    assert list(kept) == ["fast", "interrupted"]
    assert not left_out


def test_every_benchmark_has_a_name_of_its_own(every_line):
    names = [item.name for item in every_line]
    assert len(set(names)) == len(names) > 0
