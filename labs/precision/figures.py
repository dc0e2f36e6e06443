"""Quality against storage and against speed: which forms nothing else beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from labs.figure import Bars, Chart, Figure, Series
from labs.lab import Results
from labs.precision import measured
from labs.precision.model import CACHE

Point = tuple[float, float, str]  # x, bits per byte, form


def front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """The Pareto front: points that no other betters in both, in the order of x. Fewer bits are better."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p[0] if more_is_better else p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return sorted(best)


def figure(results: Results) -> Sequence[Figure]:
    drawn: list[Figure] = []
    forms = measured.measured_forms(results)
    quality = {
        form: fmean(measured.bits(results, form))
        for form in [*forms, "speculative"]
        if measured.bits(results, form)
    }
    stored = [
        (size / 1e6, bits, form)
        for form, bits in quality.items()
        if (size := measured.one(results, form, "weights_B")) and not form.startswith("cache")
    ]
    if stored:
        series = [_points("forms", stored), _line(front(stored, more_is_better=False))]
        drawn.append(
            Chart(
                "Storage against quality",
                "file (MB)",
                "bits per byte (bits)",
                series,
                x_log=True,
                note=measured.judged_on(results),
            )
        )
    speeds: dict[bool, list[Point]] = {}
    for predicted in (False, True):
        speeds[predicted] = [
            (1 / seconds, bits, form)
            for form, bits in quality.items()
            if (seconds := measured.seconds_per_token(results, form, predicted))
        ]
    if speeds[False]:
        series = [_points("measured", speeds[False]), _line(front(speeds[False], more_is_better=True))]
        if speeds[True]:
            series.append(_points("predicted from bytes", sorted(speeds[True]), "dashed"))
        weights = results.config.large
        drawn.append(
            Chart(
                "Speed against quality",
                "tokens per second (1/s)",
                "bits per byte (bits)",
                series,
                x_log=True,
                note=f"{measured.judged_on(results)}; speed: random weights, width {weights.width}, "
                f"{weights.layers} blocks",
            )
        )
    caches = [form for form in CACHE if results.has(f"cache/{form}")]
    if caches:
        times = [results.seconds(f"cache/{form}").value * 1e3 for form in caches]
        drawn.append(Bars("One step over a long KV cache", "time (ms)", caches, {"measured": times}))
    return drawn


def _points(name: str, points: Sequence[Point], style: str = "points") -> Series:
    xs, ys, labels = ([point[i] for point in points] for i in range(3))
    return Series(name, xs, ys, style=style, labels=labels)  # type: ignore[arg-type]


def _line(points: Sequence[Point]) -> Series:
    return Series("front", [point[0] for point in points], [point[1] for point in points], style="line")
