"""Open-loop load: who comes when, with how many tokens, fixed by a seed before anything is served."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from labs.serving.request import Request
from labs.serving.weights import VOCABULARY


@dataclass(frozen=True)
class Load:
    """What arrives.

    rate: requests/s, their gaps exponential (Poisson arrivals). prompt, output: mean tokens; each length is
    uniform from half to one and a half times it. common: share of a mean prompt that all requests begin with.
    """

    rate: float
    prompt: int
    output: int
    common: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and 0 < self.rate <= 1e6):
            raise ValueError(f"rate={self.rate} requests/s must lie above 0 and be at most 1000000")
        if self.prompt < 1 or self.output < 1:
            raise ValueError(f"prompt={self.prompt} and output={self.output} tokens must be at least 1")
        if not 0 <= self.common < 0.5:
            raise ValueError(
                f"common={self.common} of a prompt must lie from 0 to below 0.5, the shortest prompt's length"
            )


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds from the beginning
    request: Request


def arrivals(load: Load, count: int, first: int = 0) -> list[Arrival]:
    """``count`` requests, numbered from ``first``; those of another ``first`` are others. At another rate the
    same ones come in the same order."""
    if count < 1:
        raise ValueError(f"count={count} requests; there must be at least 1")
    drawn = random.Random(f"{load.seed} {first}")
    common = tuple(random.Random(load.seed).choices(range(VOCABULARY), k=round(load.common * load.prompt)))
    found, now = [], 0.0
    for number in range(first, first + count):
        now += drawn.expovariate(1.0)
        own = _length(drawn, load.prompt) - len(common)
        prompt = common + tuple(drawn.choices(range(VOCABULARY), k=max(1, own)))
        found.append(Arrival(now / load.rate, Request(number, prompt, _length(drawn, load.output))))
    return found


def _length(drawn: random.Random, mean: int) -> int:
    return drawn.randint(max(1, mean // 2), mean + mean // 2)
