"""Speculative decoding: a small model proposes, the large one verifies all proposals in one pass.

A pass over several tokens reads each weight once, as a pass over one does, so that where reading is the limit
the verification costs about one token. With greedy decoding the result is exactly the large model's own: a
proposal is kept only where it is what the large model would have chosen, and its choice replaces the first
that is not.

Exactly, as long as the choice does not hang on rounding: the pass over several tokens sums in another order,
and two logits that differ in the last bit may then change places. The proof therefore decodes in float64.

Sources: Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding",
algorithm 1; Chen et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labs.models.gpt import GPT


@dataclass(frozen=True)
class Decoded:
    """tokens: (1, prompt + count). rounds: passes of the large model. judged: proposals of the small one, of
    each round up to the first that was wrong: those behind it had no chance. accepted: the right ones."""

    tokens: torch.Tensor
    rounds: int
    judged: int
    accepted: int


@torch.no_grad()
def speculate(target: GPT, draft: GPT, prompt: torch.Tensor, count: int, lookahead: int) -> Decoded:
    """``count`` tokens more than ``prompt`` (1, length), those of ``target.generate(prompt, count)``.

    lookahead: proposals of a round, at least 1. ValueError: more than one sequence (they would accept
    different numbers of tokens), an empty prompt, or more tokens than the context of either model.
    """
    if prompt.shape[0] != 1 or prompt.shape[1] < 1 or lookahead < 1 or count < 0:
        raise ValueError(
            f"a prompt of shape {tuple(prompt.shape)}, count={count}, lookahead={lookahead}: one "
            "sequence of at least 1 token, a count of at least 0 and a lookahead of at least 1 are needed"
        )
    end = prompt.shape[1] + count
    room = min(target.config.context, draft.config.context)
    if end > room:
        raise ValueError(f"{end} tokens do not fit the context of {room}")
    target_cache, draft_cache = target.new_cache(end), draft.new_cache(end)
    tokens = prompt
    rounds = judged = accepted = 0
    while tokens.shape[1] < end:
        ahead = min(lookahead, end - tokens.shape[1] - 1)  # the round's own token always comes on top
        guess = tokens
        for _ in range(ahead):
            logits = draft(guess[:, draft_cache[0].length :], cache=draft_cache)
            guess = torch.cat((guess, logits[:, -1:].argmax(-1)), 1)
        logits = target(guess[:, target_cache[0].length :], cache=target_cache)
        choices = logits[0, -ahead - 1 :].argmax(-1)  # what the target puts after each of the last tokens
        right = int((choices[:ahead] == guess[0, tokens.shape[1] :]).long().cumprod(0).sum())
        tokens = torch.cat((guess[:, : tokens.shape[1] + right], choices[None, right : right + 1]), 1)
        for cache in (*target_cache, *draft_cache):  # keys of refused tokens are overwritten
            cache.length = min(cache.length, tokens.shape[1] - 1)
        rounds, judged, accepted = rounds + 1, judged + min(right + 1, ahead), accepted + right
    return Decoded(tokens, rounds, judged, accepted)
