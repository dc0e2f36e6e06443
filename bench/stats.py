"""The one statistical engine: is *new* slower than *base*, by how much, and can that be known?

Two functions timed one after the other differ by whatever the machine did meanwhile. Timed in the same
rounds, drift hits both and cancels in the ratio of each round; what remains is judged by a bootstrap
interval of the median log-ratio, and "cannot tell" is a verdict (*undecidable*).

The bootstrap resamples blocks of neighbouring rounds (circular block bootstrap: Politis and Romano, 1992,
"A circular block-resampling procedure for stationary data"), because rounds that follow each other share
the machine's mood and are not independent. Below ``FEW`` rounds resampling is too optimistic, so the
interval is Student's t on the logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["faster", "slower", "same", "undecidable"]
TOLERANCE = 0.02
"""Differences within 2 % are called *same*: the layout of code and data alone moves times that much."""
FEW = 10
DRAWS = 1000
# 97.5 % quantiles of Student's t for 1 to 8 degrees of freedom (the tests check them against SciPy).
_STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)
_NORMAL = 1.9600  # the same quantile of the normal distribution
MIN_SAMPLES_UNPAIRED = 5


@dataclass(frozen=True)
class Comparison:
    """ratio = new seconds / base seconds with its 95 % interval [low, high]; above 1 new is slower."""

    ratio: float
    low: float
    high: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.verdict}: {self.ratio:.3f}x [{self.low:.3f}, {self.high:.3f}]"


def _positive(name: str, seconds: Sequence[float]) -> np.ndarray:
    values = np.asarray(seconds, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty sequence of seconds, not of shape {values.shape}")
    if not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError(f"{name} must hold positive finite seconds")
    return values


def resamples(count: int, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """int64 (draws, count): indices of circular block resamples of ``count`` neighbouring rounds."""
    length = max(1, round(count ** (1 / 3)))
    blocks = -(-count // length)
    starts = rng.integers(0, count, (draws, blocks, 1))
    index = (starts + np.arange(length)) % count
    return index.reshape(draws, -1)[:, :count]


def _block_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of DRAWS circular block resamples of ``values``."""
    return np.median(values[resamples(values.size, rng)], axis=1)


def small_sample_factor(count: int) -> float:
    """By how much Student's t widens a 95 % interval from ``count`` rounds; 1 from ``FEW`` on, where the
    bootstrap is wide enough by itself. ValueError below 2, where there is no interval."""
    if count < 2:
        raise ValueError(f"an interval takes 2 rounds or more, not {count}")
    return _STUDENT_T[count - 2] / _NORMAL if count < FEW else 1.0


def _log_interval(logs: np.ndarray) -> tuple[float, float, float]:
    """(median, low, high) of the logarithms (or of any values that add up, as logarithms do)."""
    count = logs.size
    if count == 1:
        return float(logs[0]), -math.inf, math.inf
    if count < FEW:
        center, spread = float(np.mean(logs)), float(np.std(logs, ddof=1))
        reach = _STUDENT_T[count - 2] * spread / math.sqrt(count)
        middle = float(np.median(logs))
        return middle, min(center - reach, middle), max(center + reach, middle)
    medians = _block_medians(logs, np.random.default_rng(count))
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(logs)), float(low), float(high)


def judge(low: float, high: float, tolerance: float = TOLERANCE) -> Verdict:
    """The verdict on an interval of new/base."""
    if low > 1 + tolerance:
        return "slower"
    if high < 1 / (1 + tolerance):
        return "faster"
    if low >= 1 / (1 + tolerance) and high <= 1 + tolerance:
        return "same"
    return "undecidable"


def _comparison(middle: float, low: float, high: float, tolerance: float) -> Comparison:
    ratio, below, above = math.exp(middle), math.exp(low), math.exp(high)
    return Comparison(ratio, below, above, judge(below, above, tolerance))


def compare_pairs(
    base_seconds: Sequence[float], new_seconds: Sequence[float], *, tolerance: float = TOLERANCE
) -> Comparison:
    """Compare times taken in the same rounds: ``base_seconds[i]`` and ``new_seconds[i]`` belong together.

    Raises ValueError for sequences that are empty, of unequal length, or hold anything but positive
    finite seconds.
    """
    base, new = _positive("base_seconds", base_seconds), _positive("new_seconds", new_seconds)
    if base.size != new.size:
        raise ValueError(f"pairs need equal lengths, not {base.size} base and {new.size} new seconds")
    return _comparison(*_log_interval(np.log(new) - np.log(base)), tolerance)


def compare_samples(
    base_seconds: Sequence[float], new_seconds: Sequence[float], *, tolerance: float = TOLERANCE
) -> Comparison:
    """Compare times of separate runs (no pairs): ratio of medians, each resampled in blocks.

    The interval knows the noise inside each run, not what changed between them (frequency, neighbours),
    so it is the weaker evidence of the two. With fewer than 5 samples on a side: *undecidable*.
    """
    base, new = _positive("base_seconds", base_seconds), _positive("new_seconds", new_seconds)
    middle = float(np.log(np.median(new)) - np.log(np.median(base)))
    if base.size == new.size and np.array_equal(base, new):
        return _comparison(0.0, 0.0, 0.0, tolerance)  # the very same measurement
    if min(base.size, new.size) < MIN_SAMPLES_UNPAIRED:
        return Comparison(math.exp(middle), 0.0, math.inf, "undecidable")
    differences = _block_medians(np.log(new), np.random.default_rng(new.size)) - _block_medians(
        np.log(base), np.random.default_rng(base.size + 1)
    )
    low, high = np.quantile(differences, [0.025, 0.975])
    return _comparison(middle, min(low, middle), max(high, middle), tolerance)


def median_interval(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of positive values, e.g. the times of one variant."""
    middle, low, high = _log_interval(np.log(_positive("seconds", seconds)))
    return math.exp(middle), math.exp(low), math.exp(high)


def center_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of finite values of either sign, e.g. differences of two clocks."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size == 0 or not np.all(np.isfinite(found)):
        raise ValueError("values must be a non-empty sequence of finite numbers")
    return _log_interval(found)


def quantity_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of a recorded quantity's finite values, one a round; without a width where all are
    equal, as counts are."""
    if min(values) == max(values):
        return values[0], values[0], values[0]
    return median_interval(values) if min(values) > 0 else center_interval(values)
