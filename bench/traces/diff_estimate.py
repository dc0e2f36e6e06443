"""By how much a step changed, through which operations, and how sure that is.

The typical time of an operation is its median over the steps (its mean where it does not occur in most of
them, or with fewer than 5 steps), and the **typical step** is the sum of these: a hiccup in one step disturbs
one median and no sum, and contributions add up to the change by construction.

Intervals resample steps in blocks (``bench.stats``). They know the noise inside each recording, not what
changed between the two: a neighbour on the same cores makes *everything* slower. That leaves a mark, for few
changes of a program move unrelated operations by one factor. Where most operations agree on a factor it
stands apart as **alike**, operations are held against it, and the step is called slower or faster only if it
is so with and without it. How far operations scatter around the factor, although nothing about them changed,
widens all intervals. Recordings made in turns (base, new, base, new ...) need none of this: each pair of
neighbours shares the machine's mood, and the differences inside pairs are what is resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bench.stats import (
    MIN_SAMPLES_UNPAIRED,
    TOLERANCE,
    Comparison,
    judge,
    resamples,
    small_sample_factor,
)

_MIN_PAIRS = 5
_MIN_WITNESSES = 8
_LARGE = 200  # operations resampled one by one; the rest are resampled as one sum
_CHUNK = 4_000_000  # numbers resampled at once
_LARGEST_SCATTER = 0.1  # beyond, unchanged operations are no longer what is seen
_LARGEST_FACTOR = 2.0  # a core shared with one neighbour; beyond, it is not the machine that changed


@dataclass(frozen=True)
class Sample:
    """nanoseconds: (steps, operations). start: int64 (steps,) since 1970 if ``absolute``."""

    nanoseconds: np.ndarray
    start: np.ndarray
    absolute: bool


@dataclass(frozen=True)
class Estimate:
    """base, new: (operations,) typical nanoseconds a step. alike: factor that most operations share, 1 where
    they share none. excess: (operations,) nanoseconds of change beyond it. reach: (operations,) half the
    interval of the excess, for all operations at once (Bonferroni, 95 %); inf with too few steps.
    step: new/base of the typical step. pairs: how many pairs of neighbouring recordings, 0 for separate ones.
    """

    base: np.ndarray
    new: np.ndarray
    alike: float
    excess: np.ndarray
    reach: np.ndarray
    step: Comparison
    pairs: int


def estimate(base: Sample, new: Sample, *, scales: np.ndarray, witnesses: np.ndarray) -> Estimate:
    """scales: bool (operations,), False for what the machine's speed does not multiply (idle, communication).
    witnesses: bool (operations,), the same work on both sides: whether they agree on a factor is asked."""
    pairs = in_turns(base, new)
    if pairs:
        before = np.stack([_typical(base.nanoseconds[rows], few=True) for rows, _ in pairs])
        after = np.stack([_typical(new.nanoseconds[rows], few=True) for _, rows in pairs])
        count = len(pairs)
    else:
        before, after = base.nanoseconds, new.nanoseconds
        count = min(len(before), len(after))
    few = count < MIN_SAMPLES_UNPAIRED
    usual = _usual(before, after)
    first = _location(before, usual, few)
    second = first + _location(after - before, usual, few) if pairs else _location(after, usual, few)
    factor, scatter = (1.0, 0.0) if pairs else _alike(first, second, scales & witnesses)
    excess = second - first * np.where(scales, factor, 1.0)
    ratio = second.sum() / first.sum() if first.sum() > 0 and second.sum() > 0 else 1.0
    unknown = Comparison(float(ratio), 0.0, math.inf, "undecidable")
    if np.array_equal(before, after):  # the very same measurement
        same = Comparison(1.0, 1.0, 1.0, "same")
        return Estimate(first, second, 1.0, excess, np.zeros_like(excess), same, len(pairs))
    if few or not first.sum() > 0 or not second.sum() > 0:
        return Estimate(first, second, factor, excess, np.full_like(excess, np.inf), unknown, len(pairs))
    spread, raw, adjusted = _resample(before, after, first, second, usual, scales, factor, bool(pairs))
    widened = small_sample_factor(count)
    quantile = NormalDist().inv_cdf(1 - 0.025 / len(first))
    moved = scatter * first * np.where(scales, factor, 0.0)
    reach = quantile * np.hypot(spread * widened, moved)
    intervals = [_around(raw, ratio, widened)]
    if factor != 1.0:
        intervals.append(_around(adjusted, 1 + float(excess.sum() / first.sum()), widened))
    margin = 1.96 * float(np.linalg.norm(moved) / first.sum())
    low = max(0.0, min(low for low, _ in intervals) - margin)
    high = max(high for _, high in intervals) + margin
    step = Comparison(float(ratio), low, high, judge(low, high, TOLERANCE))
    return Estimate(first, second, factor, excess, reach, step, len(pairs))


def in_turns(base: Sample, new: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of neighbouring stretches of steps (rows of base, rows of new) of recordings made in turns;
    none where there are fewer than 5."""
    if not (base.absolute and new.absolute and len(base.start) and len(new.start)):
        return []
    time = np.concatenate((base.start, new.start))
    is_new = np.repeat([False, True], [len(base.start), len(new.start)])
    row = np.concatenate((np.arange(len(base.start)), np.arange(len(new.start))))
    order = np.argsort(time, kind="stable")
    is_new, row = is_new[order], row[order]
    stretches = np.split(np.arange(len(row)), np.flatnonzero(np.diff(is_new.astype(np.int8))) + 1)
    sides = [row[stretch] for stretch in stretches]
    pairs = [
        (second, first) if is_new[stretch[0]] else (first, second)
        for stretch, first, second in zip(stretches, sides, sides[1:], strict=False)
    ]
    return pairs if len(pairs) >= _MIN_PAIRS else []


def _usual(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """bool (operations,): occurs in most steps, of each side in which it occurs at all."""
    shares = [(side > 0).mean(axis=0) for side in (before, after)]
    return (np.minimum(*shares) > 0.5) | ((np.minimum(*shares) == 0) & (np.maximum(*shares) > 0.5))


def _location(values: np.ndarray, usual: np.ndarray, few: bool) -> np.ndarray:
    if few:
        return values.mean(axis=-2)
    return np.where(usual, np.median(values, axis=-2), values.mean(axis=-2))


def _typical(values: np.ndarray, few: bool) -> np.ndarray:
    return _location(values, (values > 0).mean(axis=0) > 0.5, few and len(values) < 3)


def _alike(base: np.ndarray, new: np.ndarray, witnesses: np.ndarray) -> tuple[float, float]:
    """(factor new/base on which most of the witnesses agree, 1 where they do not; how far one of them is from
    it, as a standard deviation of the logarithm: what two recordings make of an operation that is the same).
    """
    known = witnesses & (base > 0) & (new > 0)
    known &= np.maximum(base, new) >= 0.002 * base.sum()
    if known.sum() < _MIN_WITNESSES:
        return 1.0, 0.0
    logs = np.log(new[known] / base[known])
    middle = float(np.median(logs))
    disagreement = float(np.median(np.abs(logs - middle)))
    agreed = disagreement <= max(TOLERANCE, abs(middle) / 2) and abs(middle) <= math.log(_LARGEST_FACTOR)
    factor = math.exp(middle) if agreed else 1.0
    return factor, min(_LARGEST_SCATTER, 1.4826 * disagreement)


def _resample(
    before: np.ndarray,
    after: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    usual: np.ndarray,
    scales: np.ndarray,
    factor: float,
    paired: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(standard error of each excess; resampled new/base of the step; the same without what is alike)."""
    size = np.maximum(first, second)
    large = np.sort(np.argsort(-size, kind="stable")[:_LARGE])
    small = np.setdiff1d(np.arange(len(size)), large)
    sides = [np.c_[side[:, large], side[:, small].sum(axis=1)] for side in (before, after)]
    fixed = np.append(usual[large], True)
    multiplied = np.append(scales[large], False)
    rng = np.random.default_rng(len(before))
    if paired:
        rows = resamples(len(before), rng)
        draws = [_locations(sides[0], rows, fixed), _locations(sides[1] - sides[0], rows, fixed)]
        draws[1] = draws[0] + draws[1]
    else:
        draws = [_locations(side, resamples(len(side), rng), fixed) for side in sides]
    excess = draws[1] - draws[0] * np.where(multiplied, factor, 1.0)
    spread = np.zeros_like(size)
    spread[large] = excess[:, :-1].std(axis=0)
    if len(small):  # what was not resampled one by one: the plain standard error
        parts = [after - before] if paired else [before, after]
        spread[small] = np.sqrt(sum(part[:, small].var(axis=0) / len(part) for part in parts))
    totals = [draw.sum(axis=1) for draw in draws]
    raw = totals[1] / totals[0]
    return spread, raw, (totals[0] + excess.sum(axis=1)) / totals[0]


def _locations(values: np.ndarray, rows: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """(draws, operations): the location of each resample."""
    at_once = max(1, _CHUNK // max(1, rows.shape[1] * values.shape[1]))
    parts = [
        _location(values[rows[index : index + at_once]], usual, False)
        for index in range(0, len(rows), at_once)
    ]
    return np.concatenate(parts)


def _around(draws: np.ndarray, middle: float, widened: float) -> tuple[float, float]:
    """The 95 % interval of the draws, widened around the middle, which it holds."""
    low, high = np.quantile(draws, [0.025, 0.975])
    center = float(np.median(draws))
    return (
        max(0.0, min(middle, middle + (float(low) - center) * widened)),
        max(middle, middle + (float(high) - center) * widened),
    )
