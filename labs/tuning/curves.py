"""What recorded learning curves say: how well a rung ranks trials, and when a search came near enough."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from labs.lab import Interval, Results, values_of
from labs.tuning.schedulers.job import by_extrapolation, ranked
from labs.tuning.ways import SEARCH

DRAWS = 500
FEW = 5
"""Trials, of which fewer have no interval."""


def curves(results: Results, address: str) -> dict[int, dict[int, float]]:
    """The curves that a variant recorded, each in increasing order of the steps."""
    found: dict[int, dict[int, float]] = {}
    columns = (values_of(results, address, name) for name in ("loss_trial", "loss_step", "loss_nats"))
    for trial, step, loss in sorted(zip(*columns, strict=True)):
        found.setdefault(int(trial), {})[int(step)] = loss
    return found


def whole_curves(results: Results) -> list[dict[int, float]]:
    """Random search's, of every configuration; a loss that was no number is infinite."""
    recorded = curves(results, f"{SEARCH}/random")
    steps = results.config.milestones()
    return [
        {step: recorded.get(trial, {}).get(step, math.inf) for step in steps}
        for trial in range(results.config.configurations)
    ]


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    found = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end + 1 < len(order) and values[order[end + 1]] == values[order[begin]]:
            end += 1
        for place in order[begin : end + 1]:
            found[place] = (begin + end) / 2 + 1
        begin = end + 1
    return found


def rank_correlation(some: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, NaN where all of one side are equal. Losses that are no numbers
    are the worst. ValueError: not as many of both, or fewer than two."""
    if len(some) != len(others) or len(some) < 2:
        raise ValueError(f"{len(some)} and {len(others)} losses: as many of both are compared, at least 2")
    xs, ys = (ranks([ranked(value) for value in side]) for side in (some, others))
    mean = (len(xs) + 1) / 2
    products = sum((x - mean) * (y - mean) for x, y in zip(xs, ys, strict=True))
    squares = [sum((value - mean) ** 2 for value in side) for side in (xs, ys)]
    return products / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else math.nan


def at(results: Results, step: int, extrapolate: bool = False) -> list[float]:
    """Of each configuration the loss after ``step`` steps, or what its curve so far is drawn on to."""
    whole = whole_curves(results)
    if not extrapolate:
        return [curve[step] for curve in whole]
    rank = by_extrapolation(results.config.most_steps)
    return [rank({at: loss for at, loss in curve.items() if at <= step}) for curve in whole]


def with_the_end(results: Results, step: int, extrapolate: bool = False) -> float:
    """Rank correlation of the losses after ``step`` steps, or of what they are drawn on to, with the end."""
    return rank_correlation(at(results, step, extrapolate), at(results, results.config.most_steps))


def closer(new: Sequence[float], base: Sequence[float], end: Sequence[float]) -> Interval:
    """Rank correlation of ``new`` with ``end`` less that of ``base``, with its 95 % interval over which
    trials there might have been: draws of the same trials, together in all three. Without bounds where they
    are fewer than FEW, or one of ten draws has no correlation.
    """
    generator = random.Random(len(end))
    found = []
    for _ in range(DRAWS):
        drawn = generator.choices(range(len(end)), k=len(end))
        mine, theirs, last = ([side[trial] for trial in drawn] for side in (new, base, end))
        difference = rank_correlation(mine, last) - rank_correlation(theirs, last)
        if not math.isnan(difference):
            found.append(difference)
    value = rank_correlation(new, end) - rank_correlation(base, end)
    if len(end) < FEW or len(found) < 0.9 * DRAWS:
        return Interval(value, -math.inf, math.inf)
    return Interval(value, *_middle(found))


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Between which 95 % of them are."""
    ordered = sorted(values)
    edge = len(ordered) // 40
    return ordered[edge], ordered[-1 - edge]


def ends(results: Results, address: str) -> list[tuple[float, float]]:
    """(seconds, loss) of each whole training, in order of time."""
    names = ("loss_at_s", "loss_nats", "loss_step")
    columns = zip(*(values_of(results, address, name) for name in names), strict=True)
    return sorted((at, loss) for at, loss, step in columns if step == results.config.most_steps)


def best(results: Results, address: str) -> float | None:
    """The least loss of a whole training, or None."""
    losses = [loss for _, loss in ends(results, address)]
    return min(losses) if losses else None


def regret(results: Results, address: str) -> float | None:
    """By how many nats a method's best is worse than random search's (negative: better)."""
    mine, theirs = best(results, address), best(results, f"{SEARCH}/random")
    return None if mine is None or theirs is None else mine - theirs


def time_to_target(results: Results, address: str) -> float | None:
    """Seconds until a whole training was within the target of random search's best; None: never."""
    least = best(results, f"{SEARCH}/random")
    if least is None:
        return None
    near = [at for at, loss in ends(results, address) if loss <= least + results.config.target_nats]
    return near[0] if near else None


def share_of_random(results: Results, address: str) -> Interval | None:
    """Seconds of a whole search over those of full random search, each run once: the interval is that of
    which jobs took longer a step than others, by drawing them again. None: one of both has no jobs."""
    mine, theirs = _jobs(results, address), _jobs(results, f"{SEARCH}/random")
    if not mine or not theirs:
        return None
    value = results.seconds(address).value / results.seconds(f"{SEARCH}/random").value
    generator = random.Random(len(mine))
    draws = [_drawn(mine, generator) / _drawn(theirs, generator) for _ in range(DRAWS)]
    return Interval(value, *(value * edge for edge in _middle(draws)))


def _jobs(results: Results, address: str) -> list[tuple[float, float]]:
    """(steps, seconds) of each job of a search."""
    if not results.has(address):
        return []
    names = ("job_start", "job_stop", "job_begin_s", "job_end_s")
    columns = zip(*(results.recorded(address, name) for name in names), strict=True)
    return [(stop - start, end - begin) for start, stop, begin, end in columns]


def _drawn(jobs: Sequence[tuple[float, float]], generator: random.Random) -> float:
    """How much longer or shorter all jobs would have taken, had these been others of the same kind."""
    drawn = generator.choices(jobs, k=len(jobs))
    steps, seconds = (sum(column) for column in zip(*jobs, strict=True))
    return sum(each for _, each in drawn) / sum(each for each, _ in drawn) * steps / seconds


def share_to_target(results: Results, address: str) -> Interval | None:
    """Seconds until a search came within the target over those of full random search; None: never."""
    reached, share = time_to_target(results, address), share_of_random(results, address)
    if reached is None or share is None:
        return None
    part = reached / max(results.recorded(address, "job_end_s"))
    return Interval(part * share.value, part * share.low, part * share.high)
