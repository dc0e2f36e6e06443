"""Proof: each token that was written is the likeliest, in a forward of the whole sequence without a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from labs.lab import Check
from labs.serving.config import Config
from labs.serving.request import Request
from labs.serving.trace import Arrival, arrivals

if TYPE_CHECKING:
    from labs.models.gpt import GPT

TOLERANCE = 1e-3
"""In logits whose standard deviation is about 4. Rounding in float32 moves them by some 1e-5."""
AGAINST = "the likeliest token of a float64 forward without a cache, its logit less that of the token written"


def shortfall(model: GPT, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """How much less likely than the likeliest a token was at most: 0 where all are the model's own choice.

    model: in float64. One forward over prompt and tokens tells all of them, since each token that was written
    is followed by the next.
    """
    import torch

    if not tokens:
        raise ValueError("no token was written; a request writes at least 1")
    with torch.no_grad():
        row = torch.tensor([[*prompt, *tokens[:-1]]])
        logits = model(row)[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(1).values - chosen).max())


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """Every request got all its tokens, each the likeliest; no block of keys and values was left behind."""
    found: list[Check] = []
    for address, output in outputs.items():
        if not isinstance(output, dict) or "tokens" not in output:
            raise TypeError(f"{address} returned no tokens")
        found.append(Check(address, float(output["leaked"]), 0.0, "no block held when all requests are done"))
        if output["tokens"]:
            error = _worst(config, address, output["tokens"])
            found.append(Check(address, error, TOLERANCE, AGAINST))
    return found


def _worst(config: Config, address: str, tokens: Mapping[int, Sequence[int]]) -> float:
    """The largest shortfall; infinite where a request is missing or has too few tokens."""
    requests = _requests(config, address)
    if set(requests) != set(tokens):
        return math.inf
    worst = 0.0
    for number, request in requests.items():
        if len(tokens[number]) != request.output:
            return math.inf
        worst = max(worst, _shortfall(_key(config), request.prompt, tuple(tokens[number])))
    return worst


def _requests(config: Config, address: str) -> dict[int, Request]:
    """Those of the first call."""
    from labs.serving import live
    from labs.serving.model import LIVE, load_of

    group, _, name = address.partition("/")
    if group == LIVE:
        trace: Sequence[Arrival] = arrivals(load_of(config), config.requests)
    else:
        trace = live.neighbour_trace(config, config.workers if name == live.TOGETHER else 1)
    return {each.request.number: each.request for each in trace}


def _key(config: Config) -> tuple[int, int, int, int]:
    return config.width, config.layers, config.context, config.seed


@cache
def _reference(key: tuple[int, int, int, int]) -> GPT:
    from labs.serving.weights import serving_model

    return serving_model(*key).double()


@lru_cache(maxsize=4096)
def _shortfall(key: tuple[int, int, int, int], prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """Kept: policies that write the same are proved once."""
    return shortfall(_reference(key), prompt, tokens)
