"""A decoder-only transformer, from GPT-2 to Llama by its options.

  tokens -> embedding -> blocks (attention, feed-forward) -> norm -> head -> logits of the next token

Sources: Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama: rotary, RMSNorm, SwiGLU, no bias).
"""

from __future__ import annotations

import torch
from torch import nn

from labs.models import positions as position
from labs.models.attention import KeyValueCache
from labs.models.configuration import GPTConfig
from labs.models.initialization import initialize
from labs.models.layers import Block, Embedding, norm


class GPT(nn.Module):
    """``GPT(config)(tokens)`` gives logits; ``torch.nn.functional.cross_entropy`` makes them a loss.

    Parallelism and pipelines are applied from outside to ``embedding``, ``blocks``, ``norm`` and ``head``.
    There are no buffers: what else the model needs is computed from positions.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, config.vocabulary)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = norm(config) if config.norm_position == "pre" else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ties what is tied and draws every parameter: also after ``to_empty``, which undoes ties."""
        if self.config.tied:
            self.head.weight = self.embedding.tokens.weight
        initialize(self, self.config, generator)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """tokens: (batch, length) int64. Returns logits (batch, length, vocabulary).

        positions: (length,) int64, where the tokens stand; by default from 0, or after those in the cache.
        cache: ``new_cache()``'s, extended by these tokens; under ``torch.no_grad``.
        ValueError: more tokens than the context.
        """
        if positions is None:
            start, length = cache[0].length if cache else 0, tokens.shape[1]
            if start + length > self.config.context:
                raise ValueError(
                    f"{start + length} tokens do not fit the context of {self.config.context}; shorten the "
                    f"input or build the model with context={start + length}"
                )
            positions = torch.arange(start, start + length, device=tokens.device)
        elif positions.shape != tokens.shape[1:]:
            raise ValueError(
                f"positions of shape {tuple(positions.shape)} for {tokens.shape[1]} tokens; each token of a "
                f"sequence has one: ({tokens.shape[1]},)"
            )
        x = self.embedding(tokens, positions)
        rotation = self.rotation(positions, x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation=rotation, cache=cache[index] if cache else None)
        return self.head(self.norm(x))

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> position.Rotation | None:
        """What every block is given with the states: cos and sin of rotary positions, or None."""
        return position.rotation(self.config, positions, dtype) if self.config.positions == "rotary" else None

    def new_cache(self, capacity: int | None = None) -> list[KeyValueCache]:
        """An empty cache for each block, with room for ``capacity`` tokens (the context)."""
        return [KeyValueCache(capacity or self.config.context) for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        tokens: torch.Tensor,
        count: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """tokens (batch, length) and ``count`` more: (batch, length + count).

        temperature 0 takes the likeliest token, otherwise one is drawn from softmax(logits / temperature).
        ValueError: an empty prompt, a negative count or temperature, or more tokens than the context.
        """
        batch, length = tokens.shape
        if length < 1 or count < 0 or temperature < 0:
            raise ValueError(
                f"a prompt of {length} tokens, count={count}, temperature={temperature}: there must be at "
                "least 1 token to start from, and count and temperature may not be negative"
            )
        if length + count > self.config.context:
            raise ValueError(
                f"{length} tokens and {count} more do not fit the context of {self.config.context}; at most "
                f"{max(self.config.context - length, 0)} can be generated"
            )
        result = torch.cat((tokens, tokens.new_zeros(batch, count)), 1)
        cache, seen = self.new_cache(length + count), 0
        for place in range(length, length + count):
            logits = self(result[:, seen:place], cache=cache)[:, -1]
            if temperature > 0:
                weights = (logits.float() / temperature).softmax(-1)
                result[:, place] = torch.multinomial(weights, 1, generator=generator)[:, 0]
            else:
                result[:, place] = logits.argmax(-1)
            seen = place
        return result
