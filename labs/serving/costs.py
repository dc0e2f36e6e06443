"""How long a step takes, fitted to steps that were run.

  step = a + r [prompts > 0] + r' [reading anew] + p prompts + b new + c pairs + g earlier
           + s [decodes > 0] + s' [writing anew] + d decodes + e context
           + (r'' if prompts > 0 else s'') log2(1 + rest / 10 ms)

the terms of ``labs.serving.engine.Shape``: a piece of a prompt costs by its tokens and by the pairs of
queries and keys in it, a decode by the sequence and by the keys it reads. Each kind reads all weights, once
for all of its kind, and from further away where the step before did something else; prompt and decode of a
mixed batch share ``a`` alone. A worker that has rested is slower, the more so the longer it did: others have
taken its place in caches, and its core has slowed down.

These are means, of a worker that has the cores' caches and memory to itself. ``Disturbance`` is what they
leave out: what workers take from each other, and how much one step or message differs from another like it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from labs.serving.engine import Shape

REST_S = 0.01


def rested(rest: float) -> float:
    """How often the time of rest has doubled, from 10 ms on."""
    return math.log2(1 + rest / REST_S)


@dataclass(frozen=True)
class Costs:
    """Seconds for each term, none negative."""

    step: float = 0.0
    prompts: float = 0.0
    new: float = 0.0
    pairs: float = 0.0
    earlier: float = 0.0
    writing: float = 0.0
    decodes: float = 0.0
    context: float = 0.0
    reading: float = 0.0
    reading_anew: float = 0.0
    writing_anew: float = 0.0
    reading_rest: float = 0.0
    writing_rest: float = 0.0

    def seconds(self, shape: Shape, rest: float = 0.0) -> float:
        """rest: seconds from the worker's last step to this one."""
        return (
            self.step
            + self.reading * (shape.prompts > 0)
            + self.prompts * shape.prompts
            + self.new * shape.new
            + self.pairs * shape.pairs
            + self.earlier * shape.earlier
            + self.writing * (shape.decodes > 0)
            + self.decodes * shape.decodes
            + self.context * shape.context
            + self.reading_anew * shape.reading_anew
            + self.writing_anew * shape.writing_anew
            + (self.reading_rest if shape.prompts else self.writing_rest) * rested(rest)
        )


@dataclass(frozen=True)
class Wires:
    """What lies between workers and who asks, seconds: submit + submit_rest x ``rested`` (request to the
    first step of a worker that had nothing to do), post (of a worker's own time, from a step's end to the
    next one's beginning), deliver (token to asker), and a hand-over: pack + pack_byte x bytes of the sender's
    own time, travel + travel_byte x bytes, then store + store_byte x bytes of the receiver's own time, before
    its next step."""

    submit: float = 0.0
    deliver: float = 0.0
    pack: float = 0.0
    pack_byte: float = 0.0
    travel: float = 0.0
    travel_byte: float = 0.0
    store: float = 0.0
    store_byte: float = 0.0
    post: float = 0.0
    submit_rest: float = 0.0


@dataclass(frozen=True)
class Disturbance:
    """How what is run differs from what was fitted.

    reading_beside_writing and its like: share by which a step with prompts takes longer while all other
    workers are at steps without; in between in proportion. Who writes keeps who asks at work, on the same
    cores. The others are factors, each as likely as the others of its kind, that a step or a way of ``Wires``
    is multiplied with; without any it takes what was fitted.
    """

    reading_beside_reading: float = 0.0
    reading_beside_writing: float = 0.0
    writing_beside_reading: float = 0.0
    writing_beside_writing: float = 0.0
    reading: tuple[float, ...] = ()
    writing: tuple[float, ...] = ()
    writing_anew: tuple[float, ...] = ()
    submit: tuple[float, ...] = ()
    deliver: tuple[float, ...] = ()  # of steps that only write, which follow close upon each other
    deliver_first: tuple[float, ...] = ()  # of steps with prompts, before which who asks had nothing to do
    post: tuple[float, ...] = ()
    travel: tuple[float, ...] = ()

    def slowness(self, prompts: bool, beside_reading: float, beside_writing: float) -> float:
        """How often longer a step takes, with prompts or without, while these shares of the others read and
        write."""
        if prompts:
            shares = self.reading_beside_reading, self.reading_beside_writing
        else:
            shares = self.writing_beside_reading, self.writing_beside_writing
        return 1 + shares[0] * beside_reading + shares[1] * beside_writing

    def kind(self, shape: Shape) -> tuple[float, ...]:
        """Factors of such steps."""
        if shape.prompts:
            return self.reading
        return self.writing_anew if shape.writing_anew else self.writing


UNDISTURBED = Disturbance()


@dataclass(frozen=True)
class Fitted:
    """How long steps and messages take, and how those that are run differ from that."""

    costs: Costs
    wires: Wires
    disturbance: Disturbance = UNDISTURBED


@dataclass(frozen=True)
class Ran:
    """A step that was run: its seconds, the shares of the other workers that read and wrote meanwhile, on
    average, and how long its worker had rested."""

    shape: Shape
    seconds: float
    beside_reading: float = 0.0
    beside_writing: float = 0.0
    rest: float = 0.0


def terms(shape: Shape, rest: float = 0.0) -> list[float]:
    """What the fields of ``Costs`` are multiplied with."""
    return [Costs(**{field.name: 1.0}).seconds(shape, rest) for field in fields(Costs)]


READING = ("prompts", "new", "pairs", "earlier", "reading", "reading_anew", "reading_rest")


def crowded(costs: Costs, disturbance: Disturbance) -> Costs:
    """While all other workers are at work, half of them at reading."""
    return Costs(
        **{
            field.name: disturbance.slowness(field.name in READING, 0.5, 0.5) * getattr(costs, field.name)
            for field in fields(Costs)
        }
    )


LEAST_STEPS = 20
OUTLIER = 3.0  # times what a step of its size takes: other work on the core, and no part of a fit
FITS = 30  # rounds: the share that neighbours take follows from the costs, and these from it


def fit(steps: Sequence[Ran]) -> tuple[Costs, Disturbance]:
    """The costs, and what neighbours take: least squares of seconds over what is expected, so that what is
    fitted is a mean.

    A term whose cost comes out negative is left out and the others are fitted again. ValueError: fewer steps
    than tell the terms apart.
    """
    import numpy as np

    if len(steps) < LEAST_STEPS:
        raise ValueError(
            f"{len(steps)} steps do not tell {len(fields(Costs))} costs apart; run {LEAST_STEPS}"
        )
    rows = np.array([terms(each.shape, each.rest) for each in steps])
    seconds = np.array([each.seconds for each in steps])
    others = np.array([[each.beside_reading, each.beside_writing] for each in steps])
    reading = np.array([each.shape.prompts > 0 for each in steps])
    slower, weights, shares = np.ones(len(steps)), 1 / seconds, list[float]()
    found = _non_negative(rows, seconds, weights)
    for _ in range(FITS):
        expected = np.maximum(rows @ found, 1e-9)
        weights = np.where(seconds <= OUTLIER * expected * slower, 1 / expected, 0.0)
        shares, slower = [], np.ones(len(steps))
        for kind in (reading, ~reading):
            more = _non_negative(others * expected[:, None], seconds - expected, weights * kind)
            slower += kind * (others @ more)
            shares += map(float, more)
        found = _non_negative(rows, seconds / slower, weights)
    return Costs(*map(float, found)), Disturbance(shares[0], shares[1], shares[2], shares[3])


def _non_negative(rows: Any, seconds: Any, weights: Any) -> Any:
    import numpy as np

    found = np.zeros(rows.shape[1])
    kept = [index for index in range(rows.shape[1]) if rows[:, index].any()]
    while True:
        values = np.linalg.lstsq(rows[:, kept] * weights[:, None], seconds * weights, rcond=None)[0]
        if (values >= 0).all():
            found[kept] = values
            return found
        kept.pop(int(np.argmin(values * rows[:, kept].mean(0))))


def factors(costs: Costs, disturbance: Disturbance, steps: Sequence[Ran]) -> list[float]:
    """Measured over predicted, of each step."""

    def predicted(step: Ran) -> float:
        beside = step.beside_reading, step.beside_writing
        return costs.seconds(step.shape, step.rest) * disturbance.slowness(step.shape.prompts > 0, *beside)

    return [step.seconds / predicted(step) for step in steps]


def residual(costs: Costs, disturbance: Disturbance, steps: Sequence[Ran]) -> float:
    """Median of |predicted / measured - 1|."""
    errors = sorted(abs(1 / factor - 1) for factor in factors(costs, disturbance, steps))
    return errors[len(errors) // 2]
