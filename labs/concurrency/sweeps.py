"""Two sweeps that find where processes start to win: over the task's length, over its payload."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from labs.concurrency import pools, workers
from labs.concurrency.config import PAYLOAD_ITERATIONS, PAYLOAD_SWEEP, TASK_SWEEP, Config
from labs.concurrency.moving import echo_arrays
from labs.lab import Interval, Measurement, Recorder, Results, Step, Variant


def _pool(kind: str, config: Config) -> pools.Pool:
    return pools.thread_pool(config.pool) if kind == "threads" else pools.process_pool(config.pool)


def _length(kind: str, iterations: int) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        each = [(iterations,)] * config.sweep_tasks
        if kind == "serial":
            return lambda: [workers.python_work(*values) for values in each]
        pool = _pool(kind, config)
        return pools.Step(lambda: pool.run(workers.python_work, each), pool.close)

    return setup


def _payload(kind: str, size: int) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        each = [(array, PAYLOAD_ITERATIONS) for array in echo_arrays(config, size)]
        pool = _pool(kind, config)
        return pools.Step(lambda: pool.run(workers.echo, each), pool.close)

    return setup


def variants(config: Config) -> Sequence[Variant]:
    """crossover_task and crossover_payload; names end with the iterations or the bytes of one task."""
    longest = TASK_SWEEP[-1]
    found = [Variant("crossover_task", f"serial_{longest}", _length("serial", longest))]
    for iterations in TASK_SWEEP:
        for kind in ("threads", "processes"):
            found.append(
                Variant("crossover_task", f"{kind}_{iterations}", _length(kind, iterations), threads=0)
            )
    for size in PAYLOAD_SWEEP:
        for kind in ("threads", "processes"):
            moved = 2.0 * size * config.pool
            found.append(
                Variant(
                    "crossover_payload", f"{kind}_{size}", _payload(kind, size), bytes_moved=moved, threads=0
                )
            )
    return found


def crossing(x: Sequence[float], ratio: Sequence[float]) -> float | None:
    """Where the ratio passes 1, by straight lines between the logarithms; None when it never does.

    With several passages (noise), the middle one.
    """
    found = []
    for left in range(len(x) - 1):
        before, after = math.log(ratio[left]), math.log(ratio[left + 1])
        if before == 0:
            found.append(x[left])
        elif before * after < 0:
            part = before / (before - after)
            found.append(x[left] * (x[left + 1] / x[left]) ** part)
    if ratio[-1] == 1:
        found.append(x[-1])
    return found[len(found) // 2] if found else None


def _between(x: Sequence[float], ratios: Sequence[Interval]) -> Interval | None:
    """The crossing with the interval that the ratios' own intervals allow."""
    value = crossing(x, [ratio.value for ratio in ratios])
    if value is None:
        return None
    ends = [crossing(x, [getattr(ratio, end) for ratio in ratios]) for end in ("low", "high")]
    # An end that never crosses leaves the crossing open on that side, as far as the sweep reaches: a falling
    # ratio's low end crosses first, a rising one's last.
    falling = ratios[0].value > ratios[-1].value
    first, last = (x[0], x[-1]) if falling else (x[-1], x[0])
    early = first if ends[0] is None else ends[0]
    late = last if ends[1] is None else ends[1]
    return Interval(value, min(early, late, value), max(early, late, value))


def _ratios(results: Results, group: str, sweep: Sequence[int]) -> list[Interval] | None:
    pairs = [(f"{group}/processes_{size}", f"{group}/threads_{size}") for size in sweep]
    if not results.has(*(name for pair in pairs for name in pair)):
        return None
    return [results.ratio(*pair) for pair in pairs]


def seconds_per_iteration(results: Results) -> float | None:
    """Measured length of one iteration of the Python work."""
    longest = f"crossover_task/serial_{TASK_SWEEP[-1]}"
    if not results.has(longest):
        return None
    return results.seconds(longest).value / (results.config.sweep_tasks * TASK_SWEEP[-1])


def derive(results: Results) -> Sequence[Measurement]:
    """The task length and the payload at which processes and threads take equally long."""
    found = []
    ratios, iteration = _ratios(results, "crossover_task", TASK_SWEEP), seconds_per_iteration(results)
    if ratios and iteration:
        interval = _between([size * iteration for size in TASK_SWEEP], ratios)
        if interval:
            found.append(Measurement("crossover_task_s", interval))
    ratios = _ratios(results, "crossover_payload", PAYLOAD_SWEEP)
    if ratios:
        interval = _between(PAYLOAD_SWEEP, ratios)
        if interval:
            found.append(Measurement("crossover_payload_B", interval))
    return found
