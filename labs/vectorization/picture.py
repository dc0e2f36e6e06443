"""The lab's pictures: speed-up over numpy per problem, share of the machine's peak, register width."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labs.figure import Bars, Figure
from labs.lab import Results, values_of

TITLES = {
    "pairwise": "Pairwise distances",
    "black_scholes": "Black-Scholes",
    "mandelbrot": "Mandelbrot",
    "floyd_warshall": "Floyd-Warshall",
}


def _speed_ups(results: Results, group: str) -> Bars | None:
    addresses = list(results.variants(group))
    base = f"{group}/numpy"
    if base not in addresses:
        return None
    base_seconds, base_predicted = results.seconds(base).value, results.predicted(base)
    measured, predicted = [], []
    for address in addresses:
        expected = results.predicted(address)
        measured.append(base_seconds / results.seconds(address).value)
        predicted.append(base_predicted / expected if base_predicted and expected else math.nan)
    return Bars(
        f"{TITLES[group]}: times as fast as numpy",
        "speed-up (numpy = 1)",
        [address.partition("/")[2] for address in addresses],
        {"measured": measured, "predicted": predicted},
        log=True,
        note="Predicted bars stand where a mechanism gives the time; the others are measured only.",
    )


def _fractions(results: Results) -> Bars | None:
    from labs.vectorization import variants

    labels, shares = [], []
    measured = set(results.variants())
    for variant in variants(results.config):
        if variant.address not in measured or variant.dtype != "float32":
            continue
        try:
            peak = results.machine.peak("float32", threads=variant.threads)
        except ValueError:
            return None
        labels.append(variant.address)
        shares.append(100 * variant.flops / results.seconds(variant.address).value / peak)
    if not labels:
        return None
    return Bars(
        "Share of the machine's peak",
        "share of the FMA peak of the threads used (%)",
        labels,
        {"measured": shares},
        log=True,
        note="Operations the problem needs per second, over the float32 FMA peak of one core or of "
        "all. Comparisons and selections are no FMA: 100 % is out of reach for all but the matrix product.",
    )


def _registers(results: Results) -> Bars | None:
    labels, bits = [], []
    for address in results.variants():
        recorded = values_of(results, address, "vector_bits")
        if recorded:
            labels.append(address)
            bits.append(float(recorded[-1]))
    if not labels:
        return None
    return Bars(
        "Register width in the compiled loop",
        "width of the packed arithmetic (bit), 0: scalar",
        labels,
        {"read from the machine code": bits},
        note="What was compiled, not what runs: Floyd-Warshall's plain loop guards its SIMD code "
        "with a test that always fails.",
    )


def figure(results: Results) -> Sequence[Figure]:
    drawn = [*(_speed_ups(results, group) for group in TITLES), _fractions(results), _registers(results)]
    return [item for item in drawn if item is not None]
