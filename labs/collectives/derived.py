"""What follows from several variants: alpha and beta of the small all-reduces, what they say of the large
one, and how much of the communication was hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from labs.collectives import overlap
from labs.collectives.config import FLOAT, SMALL_KIB
from labs.collectives.ways import SWEEP, SWEEP_WAYS
from labs.lab import Interval, Measurement, Results


def least_squares(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(alpha, beta) of ``seconds = alpha + beta size`` with the least sum of squared *relative* errors.

    Relative, or the largest size alone would decide. Neither is negative: where the free line's would be, it
    is 0 and the other is fitted alone. Two sizes at least.
    """
    if len(sizes) < 2 or len(sizes) != len(seconds):
        raise ValueError(f"a line needs two points or more, not {len(sizes)} sizes and {len(seconds)} times")
    weights = [1 / value**2 for value in seconds]
    total = sum(weights)
    x = sum(w * size for w, size in zip(weights, sizes, strict=True)) / total
    y = sum(w * value for w, value in zip(weights, seconds, strict=True)) / total
    points = list(zip(weights, sizes, seconds, strict=True))
    spread = sum(w * (size - x) ** 2 for w, size, _ in points)
    beta = sum(w * (size - x) * (value - y) for w, size, value in points) / spread
    if beta < 0:
        return y, 0.0
    if y - beta * x < 0:
        squares = sum(w * size**2 for w, size, _ in points)
        return 0.0, sum(w * size * value for w, size, value in points) / squares
    return y - beta * x, beta


def size_of(results: Results, kib: int) -> int:
    """Bytes of the sweep's all-reduce of ``kib`` KiB."""
    config = results.config
    return FLOAT * config.elements(config.ranks, kib)


def propagated(function: Callable[[list[float]], float], inputs: Sequence[Interval]) -> Interval:
    """``function`` of the inputs' values, with what their intervals leave open.

    The inputs are independent: each one is moved to its ends alone, and the changes that it makes are added
    as squares (the first-order propagation of uncertainty, JCGM 100:2008, 5.1.2, with differences for
    derivatives).
    """
    values = [each.value for each in inputs]
    centre = function(values)
    below = above = 0.0
    for index, each in enumerate(inputs):
        ends = [function([*values[:index], end, *values[index + 1 :]]) for end in (each.low, each.high)]
        below += max(0.0, centre - min(ends)) ** 2
        above += max(0.0, max(ends) - centre) ** 2
    return Interval(centre, centre - math.sqrt(below), centre + math.sqrt(above))


def small_times(results: Results, way: str) -> tuple[list[float], list[Interval]] | None:
    """Bytes and times of one way's small all-reduces; None when one of them was not measured."""
    addresses = [f"{SWEEP}/{way}_{kib}" for kib in SMALL_KIB]
    if not results.has(*addresses):
        return None
    sizes = [float(size_of(results, kib)) for kib in SMALL_KIB]
    return sizes, [results.seconds(address) for address in addresses]


def fit(results: Results, way: str) -> tuple[Interval, Interval] | None:
    """alpha (s) and beta (s/B) of one way's small all-reduces; None when one of them was not measured."""
    small = small_times(results, way)
    if small is None:
        return None
    sizes, times = small
    alpha = propagated(lambda seconds: least_squares(sizes, seconds)[0], times)
    beta = propagated(lambda seconds: least_squares(sizes, seconds)[1], times)
    return _not_negative(alpha), _not_negative(beta)


def _not_negative(found: Interval) -> Interval:
    """The changes are added as if the function were a line; it ends at zero."""
    return Interval(found.value, max(0.0, found.low), found.high)


def large_ratio(results: Results, way: str) -> Interval | None:
    """The large all-reduce's time over what the small ones' alpha and beta say.

    Its interval holds theirs too: a slope over small sizes, drawn out to a large one, is uncertain there.
    """
    small, kib = small_times(results, way), results.config.large_KiB
    address = f"{SWEEP}/{way}_{kib}"
    if small is None or not results.has(address):
        return None
    (sizes, times), size = small, size_of(results, kib)

    def quotient(seconds: list[float]) -> float:
        alpha, beta = least_squares(sizes, seconds[1:])
        return seconds[0] / (alpha + beta * size)

    return propagated(quotient, [results.seconds(address), *times])


def hidden(results: Results, kind: str) -> Interval | None:
    """What asynchronous layers saved, over the shorter of compute and communication.

    Above 1 where a rank wakes late from each wait: asynchronously it waits once, at the end.
    """
    names = [f"overlap_{kind}/{name}" for name in overlap.NAMES]
    if not results.has(*names):
        return None
    compute, communication, waited = (results.seconds(name) for name in names[:3])
    shorter = min(compute.value, communication.value)
    ratio = results.ratio(names[3], names[2])  # asynchronous / waited, paired
    shares = [waited.value * (1 - part) / shorter for part in (ratio.value, ratio.high, ratio.low)]
    return Interval(shares[0], shares[1], shares[2])


def derive(results: Results) -> Sequence[Measurement]:
    found = []
    for way in SWEEP_WAYS:
        fitted = fit(results, way)
        if fitted:
            found.append(Measurement(f"fit_{way}_latency_s", fitted[0]))
            found.append(Measurement(f"fit_{way}_s_per_byte", fitted[1]))
        ratio = large_ratio(results, way)
        if ratio:
            found.append(Measurement(f"large_{way}_ratio", ratio))
    for kind in overlap.KINDS:
        share = hidden(results, kind)
        if share:
            found.append(Measurement(f"hidden_{kind}_ratio", share))
    return found
