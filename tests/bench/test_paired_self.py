"""A/A and +5 %: how often is identical work called different, and is a small difference found?

One core is kept busy by another process throughout. ``make proof`` runs 200 trials of each. The short form
runs so few that one false alarm (1 in 20 by design) proves nothing: it fails only where comparisons are
commonly wrong, which the full form's rates would let happen about once in a thousand runs.
"""

import subprocess
import sys
import time

import numpy as np
import pytest

from bench import stats
from bench.plugin import SECONDS_PER_FUNCTION
from bench.rounds import Timed, pairs, time_together

pytestmark = pytest.mark.alone

SECONDS = 2 * SECONDS_PER_FUNCTION  # for both functions, as the fixture has it by default
LONGEST_SECONDS = 2.2  # pytest-benchmark's default of 1 s a function, and its calibration


@pytest.fixture
def busy_core():
    """Another process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"])
    yield
    process.kill()
    process.wait(10)


def work(units):
    """About 5 us of single-threaded work a unit."""
    data = np.random.default_rng(0).standard_normal(8192)

    def run():
        for _ in range(units):
            data.sum()

    return run


def compare(units_base, units_new, seconds=SECONDS):
    start = time.perf_counter()
    timed = {"base": Timed(work(units_base)), "new": Timed(work(units_new))}
    time_together(timed, seconds)
    result = stats.compare_pairs(*pairs(timed["base"], timed["new"]))
    return result, time.perf_counter() - start


def tally(trials, extra, seconds=SECONDS):
    """(how often a difference was claimed in the right direction, in any, the longest comparison)."""
    rng = np.random.default_rng(trials)
    slower = different = 0
    longest = 0.0
    for _ in range(trials):
        units = 20 * int(np.exp(rng.uniform(np.log(1), np.log(100))))  # 0.1 to 10 ms
        result, elapsed = compare(units, units + int(units * extra), seconds)
        slower += result.verdict == "slower"
        different += result.verdict in ("slower", "faster")
        longest = max(longest, elapsed)
    return slower, different, longest


def test_short_form(busy_core):
    _, false_alarms, _ = tally(2, 0.0, 1.0)
    found, _, _ = tally(3, 0.05, 1.5)
    assert false_alarms <= 1
    assert found >= 1


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_full_form(busy_core):
    trials = 200
    _, false_alarms, longest_same = tally(trials, 0.0)
    found, _, longest = tally(trials, 0.05)
    longest = max(longest, longest_same)
    print(f"A/A: {false_alarms}/{trials} false alarms; +5 %: {found}/{trials} found; longest {longest:.2f} s")
    assert longest <= LONGEST_SECONDS
    assert false_alarms <= 0.05 * trials
    assert found >= 0.90 * trials
