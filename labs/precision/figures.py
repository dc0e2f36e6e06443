"""Quality against storage and against speed: which forms nothing else beats in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Literal

from labs.figure import Bars, Chart, Figure, Series
from labs.lab import Results
from labs.precision import measured
from labs.precision.model import CACHE, tokens_per_round

BITS = "bits per byte (bits)"
Point = tuple[float, float, str]  # x, bits per byte, form


def front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """The Pareto front: points that no other betters in both, in the order of x. Fewer bits are better."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p[0] if more_is_better else p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return sorted(best)


def figure(results: Results) -> Sequence[Figure]:
    quality = {form: fmean(measured.bits(results, form)) for form in measured.measured_forms(results)}
    return [*_storage(results, quality), *_speed(results, quality), *_speculation(results), *_cache(results)]


def _storage(results: Results, quality: Mapping[str, float]) -> Iterator[Figure]:
    points = [
        (size / 1e6, bits, form)
        for form, bits in quality.items()
        if (size := measured.one(results, form, "weights_B")) and not form.startswith("cache")
    ]
    if points:
        series = [_points("forms", points), _line("front", front(points, more_is_better=False))]
        note = measured.judged_on(results)
        yield Chart("Storage against quality", "file (MB)", BITS, series, x_log=True, note=note)


def _speed(results: Results, quality: Mapping[str, float]) -> Iterator[Figure]:
    def points(predicted: bool) -> list[Point]:
        return [
            (1 / seconds, bits, form)
            for form, bits in quality.items()
            if (seconds := measured.seconds_per_token(results, form, predicted))
        ]

    if not (found := points(predicted=False)):
        return
    series = [_points("forms", found), _line("front", front(found, more_is_better=True))]
    if expected := points(predicted=True):
        series.append(_line("front, predicted", front(expected, more_is_better=True), "dashed"))
    large = results.config.large
    note = f"{measured.judged_on(results)}; speed: random weights, width {large.width}, {large.layers} blocks"
    yield Chart("Speed against quality", "tokens per second (1/s)", BITS, series, x_log=True, note=note)


def _speculation(results: Results) -> Iterator[Figure]:
    """Whether speculation pays: tokens of a round over the tokens that one by one take its time."""
    token, whole = "speculative/token", "speculative/round"
    if not results.has(token, whole):
        return
    ahead, shares = results.config.lookahead, [tenth / 10 for tenth in range(11)]

    def line(name: str, cost: float, style: Literal["line", "dashed"]) -> Series:
        return Series(name, shares, [tokens_per_round(share, ahead) / cost for share in shares], style)

    cost = results.seconds(whole).value / results.seconds(token).value
    series = [line("measured times", cost, "line")]
    expected, base = results.predicted(whole), results.predicted(token)
    if expected and base:
        series.append(line("predicted times", expected / base, "dashed"))
    share = measured.one(results, "speculative", "acceptance_share")
    count = measured.tokens_of_a_round(results)
    if share is not None and count:
        series.append(Series("the trained model and its draft", [share], [count / cost]))
    note = f"{ahead} proposals a round, which costs {cost:.2f} tokens' time; it pays above 1"
    yield Chart(
        "Speculative decoding", "probability that a proposal is right (share)", "speed (x)", series, note=note
    )


def _cache(results: Results) -> Iterator[Figure]:
    forms = [form for form in CACHE if results.has(f"cache/{form}")]
    if forms:
        times = [results.seconds(f"cache/{form}").value * 1e3 for form in forms]
        yield Bars("One step over a long KV cache", "time (ms)", forms, {"measured": times})


def _points(name: str, points: Sequence[Point]) -> Series:
    xs, ys, labels = ([point[i] for point in points] for i in range(3))
    return Series(name, xs, ys, labels=labels)  # type: ignore[arg-type]


def _line(name: str, points: Sequence[Point], style: Literal["line", "dashed"] = "line") -> Series:
    return Series(name, [point[0] for point in points], [point[1] for point in points], style)
