"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017), from the parts of the GPT.

source -> embedding -> encoder blocks (every token sees every token)  -> memory
target -> embedding -> decoder blocks (causal; each looks at the memory) -> head -> logits of the next token
"""

from __future__ import annotations

import torch
from torch import nn

from labs.models import positions as position
from labs.models.attention import KeyValueCache
from labs.models.configuration import EncoderDecoderConfig
from labs.models.initialization import initialize
from labs.models.layers import Block, Embedding, norm

Caches = list[tuple[KeyValueCache, KeyValueCache]]
"""For each block of the decoder: of its self-attention, and of its attention to the memory."""


class Stack(nn.Module):
    """Blocks one after the other, and a norm where the configuration has one after the last."""

    def __init__(self, config: EncoderDecoderConfig, layers: int, decoder: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, causal=decoder, cross=decoder) for _ in range(layers))
        self.norm = norm(config) if config.has_final_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotation: position.Rotation | None = None,
        mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        caches: Caches | None = None,
    ) -> torch.Tensor:
        """States (batch, length, width) to states. memory: what a decoder attends to."""
        for index, block in enumerate(self.blocks):
            cache, memory_cache = caches[index] if caches else (None, None)
            x = block(x, rotation, mask, cache, memory, memory_mask, memory_cache)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """``EncoderDecoder(config)(source, target)`` gives the logits of the token after each of the target's."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.source_embedding = Embedding(config, config.source_vocabulary)
        self.encoder = Stack(config, config.encoder_layers, decoder=False)
        self.target_embedding = Embedding(config, config.target_vocabulary)
        self.decoder = Stack(config, config.decoder_layers, decoder=True)
        self.head = nn.Linear(config.width, config.target_vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ties what is tied and draws every parameter: also after ``to_empty``, which undoes ties."""
        if self.config.tied:
            self.target_embedding.tokens.weight = self.source_embedding.tokens.weight
            self.head.weight = self.source_embedding.tokens.weight
        initialize(self, self.config, generator)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, source_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """source: (batch, source length), target: (batch, length), int64. Logits (batch, length, vocabulary).

        source_mask: (batch, source length) bool, False at padding; None: there is none. Padding after a
        target needs no mask, since no earlier token sees it.
        ValueError: a sequence longer than the context.
        """
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def encode(self, source: torch.Tensor, source_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The memory: (batch, source length, width)."""
        x, rotation = self._embed(self.source_embedding, source, 0)
        return self.encoder(x, rotation, _for_scores(source_mask))

    def decode(
        self,
        target: torch.Tensor,
        memory: torch.Tensor,
        source_mask: torch.Tensor | None = None,
        caches: Caches | None = None,
    ) -> torch.Tensor:
        """Logits of the target's next tokens. caches: ``new_caches()``'s, extended; under no_grad."""
        start = caches[0][0].length if caches else 0
        x, rotation = self._embed(self.target_embedding, target, start)
        memory_mask = _for_scores(source_mask)
        return self.head(self.decoder(x, rotation, None, memory, memory_mask, caches))

    def new_caches(self, source_length: int, capacity: int | None = None) -> Caches:
        """Empty caches for each block of the decoder, with room for ``capacity`` tokens (the context)."""
        capacity = capacity or self.config.context
        return [(KeyValueCache(capacity), KeyValueCache(source_length)) for _ in self.decoder.blocks]

    @torch.no_grad()
    def generate(
        self, source: torch.Tensor, start: int, count: int, source_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The likeliest ``count`` tokens after ``start``, one at a time: (batch, count)."""
        if not 1 <= count <= self.config.context:
            raise ValueError(f"count={count} tokens; the context allows 1 to {self.config.context}")
        memory = self.encode(source, source_mask)
        caches = self.new_caches(source.shape[1], count)
        tokens = source.new_full((len(source), 1), start)
        for _ in range(count):
            logits = self.decode(tokens[:, -1:], memory, source_mask, caches)
            tokens = torch.cat((tokens, logits.argmax(-1)), 1)
        return tokens[:, 1:]

    def _embed(
        self, embedding: Embedding, tokens: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, position.Rotation | None]:
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(
                f"{end} tokens do not fit the context of {self.config.context}; shorten the input or build "
                f"the model with context={end}"
            )
        positions = torch.arange(start, end, device=tokens.device)
        x = embedding(tokens, positions)
        rotary = self.config.positions == "rotary"
        return x, position.rotation(self.config, positions, x.dtype) if rotary else None


def _for_scores(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(batch, keys) for scores (batch, heads, length, keys)."""
    return None if mask is None else mask[:, None, None, :]
