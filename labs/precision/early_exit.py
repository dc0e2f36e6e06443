"""Early exit: a token that the model is sure of after half of its blocks skips the others.

An exit is a norm and a head of its own behind ``depth`` blocks, trained while the model itself stays as it
is. A token whose likeliest next byte has a probability of at least ``threshold`` there goes no further. Later
tokens need its keys and values in the skipped blocks too: they are computed from the state it left with.

Source: Schuster et al. 2022, "Confident Adaptive Language Modeling", sections 3.2 (state propagation) and 3.5
(softmax confidence).
"""

from __future__ import annotations

import torch
from torch import nn

from labs.models.attention import KeyValueCache
from labs.models.gpt import GPT


class EarlyExit(nn.Module):
    """depth: blocks before the exit, at least 1 and fewer than the model has. threshold: a probability."""

    def __init__(self, model: GPT, depth: int, threshold: float) -> None:
        super().__init__()
        if not 1 <= depth < model.config.layers:
            raise ValueError(
                f"depth={depth}: an exit is behind at least 1 and fewer than all {model.config.layers} blocks"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is no probability")
        self.model, self.depth, self.threshold = model, depth, threshold
        self.norm = nn.LayerNorm(model.config.width)
        self.head = nn.Linear(model.config.width, model.config.vocabulary, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(model.head.weight)

    def at_exit(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(states, logits) of every token behind ``depth`` blocks."""
        x = self.model.embedding(tokens, torch.arange(tokens.shape[1]))
        for block in self.model.blocks[: self.depth]:
            x = block(x)
        return x, self.head(self.norm(x))

    def sure(self, logits: torch.Tensor) -> torch.Tensor:
        """Which tokens leave: bool, logits without their last dimension."""
        return logits.softmax(-1).amax(-1) >= self.threshold

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, left): of each token, as ``decode`` would compute them one by one."""
        x, early = self.at_exit(tokens)
        left = self.sure(early)
        for block in self.model.blocks[self.depth :]:
            x = torch.where(left[..., None], x, block(x))
        late = self.model.head(self.model.norm(x))
        return torch.where(left[..., None], early, late), left

    @torch.no_grad()
    def share_leaving(self, tokens: torch.Tensor) -> float:
        """Of all tokens (windows, length)."""
        return float(
            torch.cat([self.sure(self.at_exit(some)[1]) for some in tokens.split(16)]).float().mean()
        )

    def decode(self, token: torch.Tensor, cache: list[KeyValueCache]) -> tuple[torch.Tensor, bool]:
        """(logits (1, 1, vocabulary), whether it left early) of one more token (1, 1) of one sequence."""
        x = self.model.embedding(token, torch.arange(cache[0].length, cache[0].length + 1))
        for index, block in enumerate(self.model.blocks[: self.depth]):
            x = block(x, cache=cache[index])
        early = self.head(self.norm(x))
        left = bool(self.sure(early))
        for index, block in enumerate(self.model.blocks[self.depth :], self.depth):
            if left:
                self.fill(block, x, cache[index])
            else:
                x = block(x, cache=cache[index])
        return (early if left else self.model.head(self.model.norm(x))), left

    @staticmethod
    def fill(block: nn.Module, x: torch.Tensor, cache: KeyValueCache) -> None:
        """Keys and values of a block that the token skips."""
        attention, state = block.attention, block.attention_norm(x)
        key, value = (attention._heads(layer(state)) for layer in (attention.key, attention.value))
        cache.append(key, value)
