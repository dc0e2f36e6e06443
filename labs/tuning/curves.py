"""What recorded learning curves say: how well a rung ranks trials, and when a search came near enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from labs.lab import Results
from labs.tuning.schedulers.job import Losses, by_extrapolation, ranked
from labs.tuning.ways import SEARCH

Curves = Mapping[int, Losses]
"""Trial -> steps -> loss."""


def curves(results: Results, address: str) -> dict[int, dict[int, float]]:
    """The curves that a variant recorded, each in increasing order of the steps."""
    found: dict[int, dict[int, float]] = {}
    columns = (results.recorded(address, name) for name in ("loss_trial", "loss_step", "loss_nats"))
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


def with_the_end(results: Results, step: int, extrapolate: bool = False) -> float:
    """Rank correlation of the losses after ``step`` steps, or of what they are drawn on to, with the end."""
    most = results.config.most_steps
    rank = by_extrapolation(most)
    whole = whole_curves(results)
    ends = [curve[most] for curve in whole]
    if not extrapolate:
        return rank_correlation([curve[step] for curve in whole], ends)
    begun = [{at: loss for at, loss in curve.items() if at <= step} for curve in whole]
    return rank_correlation([rank(curve) for curve in begun], ends)


def ends(results: Results, address: str) -> list[tuple[float, float]]:
    """(seconds, loss) of each whole training, in order of time."""
    names = ("loss_at_s", "loss_nats", "loss_step")
    columns = zip(*(results.recorded(address, name) for name in names), strict=True)
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


def share_of_random(results: Results, address: str) -> float | None:
    """Seconds of the whole search over those of full random search."""
    if not results.has(address, f"{SEARCH}/random"):
        return None
    return results.seconds(address).value / results.seconds(f"{SEARCH}/random").value
