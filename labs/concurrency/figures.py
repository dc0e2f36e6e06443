"""The pictures: who ran when, the two crossovers, and what each way costs."""

from __future__ import annotations

from collections.abc import Sequence

from labs.concurrency import hazards, sweeps, timeline
from labs.concurrency.config import PAYLOAD_SWEEP, TASK_SWEEP
from labs.figure import Bars, Chart, Figure, Series
from labs.lab import Results, values_of


def figure(results: Results) -> Sequence[Figure]:
    """As many of the pictures as the results have the numbers for."""
    found: list[Figure] = list(timeline.figures(results))
    iteration = sweeps.seconds_per_iteration(results)
    if iteration:
        lengths = [size * iteration for size in TASK_SWEEP]
        found += _crossover(results, "crossover_task", TASK_SWEEP, lengths, "length of a task (s)")
    sizes = [float(size) for size in PAYLOAD_SWEEP]
    found += _crossover(
        results,
        "crossover_payload",
        PAYLOAD_SWEEP,
        sizes,
        "payload of a task, each way (B)",
    )
    found += _bars(results, "python_work", "The same Python work")
    found += _bars(results, "start_up", "Starting a pool and giving each worker a task", _ray_start(results))
    found += _bars(results, "per_task", "Many tasks that do nothing")
    found += _bars(results, "transfer", "An array to a worker and back")
    found += _hazard_bars(results)
    return found


def _crossover(
    results: Results, group: str, sweep: Sequence[int], x: Sequence[float], label: str
) -> list[Figure]:
    """Processes over threads along a sweep: measured as points, predicted dashed, 1 where they are even."""
    names = [(f"{group}/processes_{size}", f"{group}/threads_{size}") for size in sweep]
    if not results.has(*(name for pair in names for name in pair)):
        return []
    ratios = [results.ratio(*pair) for pair in names]
    series = [
        Series(
            "measured",
            x,
            [ratio.value for ratio in ratios],
            "points",
            low=[ratio.low for ratio in ratios],
            high=[ratio.high for ratio in ratios],
        )
    ]
    pairs = [(results.predicted(processes), results.predicted(threads)) for processes, threads in names]
    expected = [above / below for above, below in pairs if above is not None and below]
    if len(expected) == len(x):
        series.append(Series("predicted", x, expected, "dashed"))
    series.append(Series("even", [x[0], x[-1]], [1.0, 1.0], "line"))
    title = "From which task length processes win" if "task" in group else "Up to which payload processes win"
    return [Chart(title, label, "time of processes / threads (ratio)", series, x_log=True, y_log=True)]


def _bars(results: Results, group: str, title: str, more: Sequence[tuple[str, float]] = ()) -> list[Figure]:
    variants = results.variants(group)
    if not variants:
        return []
    rows = [
        (name.split("/")[1], results.seconds(name).value, results.predicted(name) or float("nan"))
        for name in variants
    ]
    rows += [(name, value, float("nan")) for name, value in more]
    series = {"measured": [row[1] for row in rows], "predicted": [row[2] for row in rows]}
    return [Bars(title, "time (s)", [row[0] for row in rows], series, log=True)]


def _ray_start(results: Results) -> list[tuple[str, float]]:
    for variant in ("per_task/ray", "python_work/ray"):
        if values_of(results, variant, "start_s"):
            return [("ray (once)", results.recorded(variant, "start_s")[-1])]
    return []


def _hazard_bars(results: Results) -> list[Figure]:
    if not results.has(hazards.VARIANT):
        return []
    labels, seconds = [], []
    for scenario in hazards.SCENARIOS:
        outcome = "not run"
        for verdict in ("hung", "died", "finished"):
            if sum(values_of(results, hazards.VARIANT, f"{scenario.name}_{verdict}")):
                outcome = verdict
        took = values_of(results, hazards.VARIANT, f"{scenario.name}_seconds")
        labels.append(f"{scenario.name}: {outcome}")
        seconds.append(took[-1] if took else float("nan"))
    note = f"What hung was ended after {results.config.hazard_s:g} s."
    return [Bars("Known hazards", "time until it ended (s)", labels, {"measured": seconds}, note=note)]
