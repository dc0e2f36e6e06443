"""What the results say of a form: its quality, its speed on the large model, and both of its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from labs.lab import Interval, Results, values_of
from labs.precision.model import QUALITY

SPEED_OF = {
    **{form: f"token/{form}" for form in ("float32", "bfloat16", "int8", "int4")},
    **{form: f"smaller/{form}" for form in ("structured", "low_rank", "distilled", "early_exit")},
    "pruned": "smaller/sparse",
    "healed": "smaller/structured",
    "tuned": "token/float32",
    "alone": "smaller/distilled",
    "speculative": "speculative/round",
}
"""Form -> the variant that has its speed. A KV cache of fewer bits changes the speed of long contexts
alone."""


def bits(results: Results, form: str) -> Sequence[float]:
    """Bits per byte of each held-out window. Speculative decoding has its target's, int8's."""
    measured_as = "int8" if form == "speculative" else form
    return values_of(results, f"quality/{measured_as}", "bits_per_byte_bits")


def excess(results: Results, form: str, base: str = "float32") -> Interval | None:
    """By which share a form needs more bits than the base, with the 95 % interval over the same windows."""
    left, right = bits(results, form), bits(results, base)
    if len(left) < 2 or len(left) != len(right):
        return None
    return _mean([(a - b) / fmean(right) for a, b in zip(left, right, strict=True)])


def unhealed(results: Results, share: float) -> Interval | None:
    """Bits per byte by which the healed model is still behind, less ``share`` of what pruning lost.

    Behind the whole model with the same adapters, trained as long: what those give a model that has lost
    nothing is no healing. Where they do it no good, behind the whole model as it was.
    """
    names = ("float32", "tuned", "structured", "healed")
    found = dict(zip(names, (bits(results, form) for form in names), strict=True))
    count = len(found["float32"])
    if count < 2 or any(len(each) != count for each in found.values()):
        return None
    best = min(found["float32"], found["tuned"], key=fmean)
    windows = zip(found["healed"], best, found["structured"], found["float32"], strict=True)
    return _mean([healed - whole - share * (pruned - before) for healed, whole, pruned, before in windows])


def _mean(values: Sequence[float]) -> Interval:
    middle, half = fmean(values), 1.96 * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def one(results: Results, form: str, name: str) -> float | None:
    """The last value of this name that the form's quality variant recorded."""
    values = values_of(results, f"quality/{form}", name)
    return values[-1] if values else None


LEARNED = 3.2
"""Bits per byte. Which byte follows which gives 3.4 without any block; a model above this knows little more
and makes so little of its blocks that it can lose them. make model's has 2.9, the short one 3.7."""


def has_learned(results: Results) -> bool:
    values = bits(results, "float32")
    return bool(values) and fmean(values) <= LEARNED


def tokens_of_a_round(results: Results) -> float | None:
    rounds = one(results, "speculative", "rounds_rounds")
    return results.config.prompts * results.config.tokens / rounds if rounds else None


def seconds_per_token(results: Results, form: str, predicted: bool = False) -> float | None:
    """Of the large model, with the share of early exits and the tokens of a round that the trained one
    had."""

    def of(address: str) -> float | None:
        if predicted:
            return results.predicted(address)
        return results.seconds(address).value if results.has(address) else None

    value = of(SPEED_OF[form]) if form in SPEED_OF else None
    if value is None:
        return None
    if form == "speculative":
        count = tokens_of_a_round(results)
        return value / count if count else None
    if form == "early_exit":
        left, whole = one(results, form, "left_early_share"), of("smaller/float32")
        return None if left is None or whole is None else left * value + (1 - left) * whole
    return value


def judged_on(results: Results) -> str:
    """Which model the quality is of."""
    steps = one(results, "float32", "trained_steps_steps")
    full = one(results, "float32", "trained_in_full_share")
    if steps is None:
        return "no quality was measured"
    if full:
        return f"quality: the model that make model trained for {steps:.0f} steps"
    return f"quality: a small model trained for {steps:.0f} steps only; `make model` trains the real one"


def measured_forms(results: Results) -> list[str]:
    return [form for form in QUALITY if bits(results, form)]
