"""Searches again on a simulated clock, from the curves that random search recorded, with jobs that are late.

The schedulers are those that ran on real workers; only who computes the losses differs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from labs.lab import Interval, Results
from labs.tuning import curves
from labs.tuning.running import Trace, search
from labs.tuning.simulated import Late, SimulatedWorkers
from labs.tuning.ways import SEARCH

DRAWS = 16


def simulated(results: Results, name: str, seed: int, late: bool = True) -> Trace:
    """One draw of who is late. A step takes what it took random search."""
    config = results.config
    (steps,) = results.recorded(f"{SEARCH}/random", "steps")
    step_s = results.seconds(f"{SEARCH}/random").value * config.workers / steps
    lateness = Late(config.late_probability, config.late_factor, seed) if late else Late()
    workers = SimulatedWorkers(config.simulated_workers, curves.whole_curves(results), step_s, late=lateness)
    return search(config.scheduler(name), workers)


def traces(results: Results, name: str) -> list[Trace]:
    """Of each draw."""
    return [simulated(results, name, seed) for seed in range(DRAWS)]


def busier(results: Results, new: str, base: str) -> Interval:
    """utilisation(new) / utilisation(base) over the draws: the mean with its 95 % interval."""
    pairs = zip(traces(results, new), traces(results, base), strict=True)
    return _mean([mine.utilisation / other.utilisation for mine, other in pairs])


def times_as_fast(results: Results, new: str, base: str) -> Interval:
    """seconds(base) / seconds(new), likewise. Who is busier may also have more to do."""
    pairs = zip(traces(results, new), traces(results, base), strict=True)
    return _mean([other.seconds / mine.seconds for mine, other in pairs])


def _mean(values: Sequence[float]) -> Interval:
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
