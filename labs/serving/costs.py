"""How long a step takes, fitted to steps that were run.

  step = a + r [prompts > 0] + p prompts + b new + c pairs + g earlier
           + s [decodes > 0] + d decodes + e context

the terms of ``labs.serving.engine.Shape``: a piece of a prompt costs by its tokens and by the pairs of
queries and keys in it, a decode by the sequence and by the keys it reads. Each kind reads all weights, once
for all of its kind; prompt and decode of a mixed batch share ``a`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from labs.serving.engine import Shape


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

    def seconds(self, shape: Shape) -> float:
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
        )


@dataclass(frozen=True)
class Wires:
    """What lies between workers and who asks, seconds: submit (request to engine), deliver (token to asker),
    and a hand-over: pack + pack_byte x bytes of the sender's own time, travel + travel_byte x bytes, then
    store + store_byte x bytes of the receiver's own time, before its next step."""

    submit: float = 0.0
    deliver: float = 0.0
    pack: float = 0.0
    pack_byte: float = 0.0
    travel: float = 0.0
    travel_byte: float = 0.0
    store: float = 0.0
    store_byte: float = 0.0


def terms(shape: Shape) -> list[float]:
    """What the fields of ``Costs`` are multiplied with."""
    return [Costs(**{field.name: 1.0}).seconds(shape) for field in fields(Costs)]


LEAST_STEPS = 20


def fit(steps: Sequence[tuple[Shape, float]]) -> Costs:
    """Non-negative least squares of the relative error; steps that were disturbed are left out.

    A term whose cost comes out negative is left out and the others are fitted again. ValueError: fewer steps
    than tell the terms apart.
    """
    import numpy as np

    if len(steps) < LEAST_STEPS:
        raise ValueError(
            f"{len(steps)} steps do not tell {len(fields(Costs))} costs apart; run {LEAST_STEPS}"
        )
    rows = np.array([terms(shape) for shape, _ in steps])
    seconds = np.array([time for _, time in steps])
    weights = 1 / seconds
    weights = _without_outliers(rows, seconds, weights)
    names = [field.name for field in fields(Costs)]
    kept = [index for index in range(len(names)) if rows[:, index].any()]
    while True:
        found = np.linalg.lstsq(rows[:, kept] * weights[:, None], seconds * weights, rcond=None)[0]
        if (found >= 0).all():
            return Costs(**{names[index]: float(value) for index, value in zip(kept, found, strict=True)})
        kept.pop(int(np.argmin(found * rows[:, kept].mean(0))))


def _without_outliers(rows: Any, seconds: Any, weights: Any) -> Any:
    """Weight 0 for steps that took more than three times what steps of their size take: other work on the
    core."""
    import numpy as np

    found = np.linalg.lstsq(rows * weights[:, None], seconds * weights, rcond=None)[0]
    expected = np.maximum(rows @ found, 1e-9)
    return np.where(seconds > 3 * expected, 0.0, weights)


def residual(costs: Costs, steps: Sequence[tuple[Shape, float]]) -> float:
    """Median of |predicted / measured - 1|."""
    errors = sorted(abs(costs.seconds(shape) / seconds - 1) for shape, seconds in steps)
    return errors[len(errors) // 2]
