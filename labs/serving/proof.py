"""Proof: each token that was written is the likeliest, in a forward of the whole sequence without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
