"""From which size on do our kernels beat torch's own operation? What ``kernels/crossover.json`` holds.

    pytest bench/suites/test_crossover.py --write-crossover

Each operation runs at 1, 2, 4, ... rows, until torch takes 20 ms, which does not notice what a launch costs,
or has 64 MB of float32: what has 32 MiB or more glibc's malloc fetches from the system at every call, ours in
huge pages (``kernels.fresh_memory``). The crossover is the size from which on ours, called without a
crossover, serves better. The forward pass decides: the backward runs what the forward chose.

``test_small`` then holds every public function, as users call it, to twice torch's time at (8, 64).
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.plugin import TABLES
from bench.rounds import Timed, pairs, time_together
from bench.stats import Comparison, compare_pairs
from kernels.op import without_crossover
from kernels.spec import NEVER, Sized, Step, sized
from labs.calibration_facts import model_name
from labs.machine import usable_cores

SIZES = Path(__file__).parents[2] / "kernels" / "crossover.json"
LONG_SECONDS, LARGE_ELEMENTS = 0.02, 1 << 24
SECONDS, QUICK_SECONDS = 0.3, 0.05
"""Of measuring a size; the latter in a quick run that keeps nothing."""
OPERATIONS = {one.operation: one for one in sized()}


def compare(base_step: Step, new_step: Step, seconds: float) -> tuple[Comparison, float]:
    """new over base in interleaved rounds, warm-up included in the seconds; and the median seconds of new."""
    base, new = Timed(base_step), Timed(new_step)
    time_together({"base": base, "new": new}, seconds)
    return compare_pairs(*pairs(base, new)), median(new.seconds)


def measure(one: Sized, seconds_of_size: float) -> list[tuple[int, Comparison]]:
    """[(elements, torch's seconds over ours)] at growing sizes."""
    found: list[tuple[int, Comparison]] = []
    seconds, rows = 0.0, 1
    while seconds < LONG_SECONDS and (not found or found[-1][0] < LARGE_ELEMENTS):
        elements, ours, torchs = one.ways(rows, one.columns, "cpu")
        comparison, seconds = compare(ours, torchs, seconds_of_size)
        found.append((elements, comparison))
        rows *= 2
    return found


def crossover_of(found: list[tuple[int, Comparison]]) -> int:
    """Where to go over from torch to ours, so that the wrong choice costs least over all measured sizes.

    The cost of a choice is the logarithm of its time over the other's, where it is the slower one: a few
    sizes at which noise or a cache decides do not move the crossover. 0: ours everywhere; NEVER: torch's.
    """
    sizes = [0, *(elements for elements, _ in found[1:]), NEVER]
    gains = [math.log(comparison.ratio) for _, comparison in found]  # of ours over torch

    def cost(cut: int) -> float:
        return sum(max(0.0, gain) for gain in gains[:cut]) + sum(max(0.0, -gain) for gain in gains[cut:])

    return sizes[min(range(len(sizes)), key=cost)]


def between(found: list[tuple[int, Comparison]]) -> list[int]:
    """[the largest size at which torch's surely serves better, the smallest from which ours surely does], by
    the 95 % intervals; 0 and NEVER where there is none."""
    torchs = [elements for elements, comparison in found if comparison.high < 1]
    last = torchs[-1] if torchs else 0
    ours = [elements for elements, comparison in found if comparison.low > 1 and elements > last]
    return [last, ours[0] if ours else NEVER]


def say(config: pytest.Config, text: str) -> None:
    """A line of the terminal's summary."""
    config.stash.setdefault(TABLES, []).append(lambda width: text + "\n")


@pytest.mark.parametrize("name", OPERATIONS)
def test_crossover(name: str, pytestconfig: pytest.Config) -> None:
    one, writes = OPERATIONS[name], pytestconfig.getoption("write_crossover")
    quick = pytestconfig.getoption("perflab_scale") == "quick" and not writes
    with without_crossover():
        found = measure(one, QUICK_SECONDS if quick else SECONDS)
    crossover = min(one.most, crossover_of(found))
    shown = ", ".join(f"{size}: {comparison.ratio:.2f}" for size, comparison in found)
    where = "at no size" if crossover == NEVER else f"from {crossover} elements"
    say(pytestconfig, f"{name}: ours {where} (elements: torch's time over ours: {shown})")
    assert len(found) > 1
    if writes:
        data = json.loads(SIZES.read_text())
        data["elements"]["cpu"][name] = crossover
        data["measured"]["cpu"][name] = {
            "between": between(found),
            "on": f"{model_name()}, {usable_cores()} cores",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        for part in ("elements", "measured"):
            data[part]["cpu"] = dict(sorted(data[part]["cpu"].items()))
        SIZES.write_text(json.dumps(data, indent=2) + "\n")


@pytest.mark.parametrize("name", OPERATIONS)
def test_small(name: str, pytestconfig: pytest.Config) -> None:
    """A public function is a choice that costs: at (8, 64) at most as much again as torch's own operation."""
    _, ours, torchs = OPERATIONS[name].ways(8, 64, "cpu")
    comparison, seconds = compare(torchs, ours, 0.6)
    said = f"{name} (8, 64): {comparison.ratio:.2f} times torch's time, {seconds * 1e6:.1f} us"
    say(pytestconfig, said)
    assert comparison.low <= 2.0, said
