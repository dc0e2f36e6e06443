"""The step that only decodes, of all layers, as one compiled call: a token each of several sequences.

In torch such a step is some 500 calls of a few microseconds around 13 MB of weights that one core reads in
about a millisecond. Here the calls are gone, and what is left is that reading: each matrix is packed once in
panels of 64 columns, in the order in which ``kernels.tiles.multiply`` reads it, and each panel serves all
sequences while it is in the first-level cache. Queries, keys and values are one product, gate and up another;
products add themselves to the residual stream. Attention reads a block of keys as it lies in the cache.

The same formulas as ``labs.models.gpt`` (pre-norm, RMSNorm, rotary positions, SwiGLU), whose blocks read the
prompts; the tests hold both to a forward without a cache.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.tiles import PANEL, ROWS
from labs.models.gpt import GPT
from labs.serving.compiled_step import step


def takes(model: GPT) -> bool:
    """Whether the step is that of this model; others decode as they read."""
    config = model.config
    return (
        (config.positions, config.norm, config.norm_position) == ("rotary", "rms", "pre")
        and (config.activation, config.bias) == ("swiglu", False)
        and config.heads == config.key_heads
        and config.heads * config.size_of_head == config.width
        and config.width % PANEL == 0
        and model.head.weight.dtype == torch.float32
        and model.head.weight.device.type == "cpu"
    )


class CompiledDecode:
    """The step of a model over its cache, weights packed. They are copies: the model may not change."""

    def __init__(self, model: GPT, cache: torch.Tensor) -> None:
        self.config, self.cache = model.config, cache
        attentions = [block.attention for block in model.blocks]
        forwards = [block.feed_forward for block in model.blocks]
        self.weights = [
            model.embedding.tokens.weight.detach().contiguous(),
            torch.stack(
                [
                    norm.weight.detach()
                    for block in model.blocks
                    for norm in (block.attention_norm, block.feed_forward_norm)
                ]
                + [model.norm.weight.detach()]
            ),
            _packed([[each.query.weight, each.key.weight, each.value.weight] for each in attentions]),
            _packed([[each.output.weight] for each in attentions]),
            _packed([[each.gate.weight, each.up.weight] for each in forwards]),
            _packed([[each.down.weight] for each in forwards]),
            _packed([[model.head.weight]]),
        ]
        places = torch.arange(self.config.context)
        rotation = model.rotation(places, torch.float32)
        assert rotation is not None  # ``takes`` has asked
        self.rotation = [table.contiguous() for table in rotation]
        self.scratch: dict[int, list[torch.Tensor]] = {}

    def __call__(self, tokens: list[int], positions: list[int], tables: list[list[int]]) -> torch.Tensor:
        """Logits (sequences, vocabulary) of the token that each sequence has at its position; its keys and
        values are stored. tables: the blocks of each, up to its position at least. Valid until the next
        call. ValueError: a position beyond the context."""
        if max(positions) >= self.config.context:
            raise ValueError(
                f"a token at position {max(positions)} does not fit the context of {self.config.context}"
            )
        sequences, size = len(tokens), self.cache.shape[4]
        table = np.zeros((sequences, max(positions) // size + 1), np.int64)
        for row, (position, blocks) in enumerate(zip(positions, tables, strict=True)):
            count = position // size + 1
            table[row, :count] = blocks[:count]
        rows = -(-sequences // ROWS) * ROWS
        scratch = self._scratch(rows)
        step(
            1,
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.from_numpy(table),
            self.cache,
            *self.weights,
            *self.rotation,
            self.config.norm_epsilon,
            *scratch,
        )
        return scratch[-1][:sequences, : self.config.vocabulary]

    def _scratch(self, rows: int) -> list[torch.Tensor]:
        """x, y, wide, scores and logits; rows that no sequence has stay zero or are what was there."""
        if rows not in self.scratch:
            _, _, qkv, _, gate_up, _, head = self.weights
            width, hidden = self.config.width, gate_up.shape[1] // 2 * PANEL
            self.scratch[rows] = [
                torch.zeros(rows, width),
                torch.zeros(rows, max(width, hidden)),
                torch.zeros(rows, max(qkv.shape[1], gate_up.shape[1]) * PANEL),
                torch.zeros(self.config.context),
                torch.zeros(rows, head.shape[1] * PANEL),
            ]
        return self.scratch[rows]


def _packed(layers: list[list[torch.Tensor]]) -> torch.Tensor:
    """Of each layer the weights (out, in) beside each other, each filled up to whole panels with zeros:
    (layers, panels, in, PANEL)."""
    found: list[torch.Tensor] = []
    for weights in layers:
        panels = []
        for weight in weights:
            out, depth = weight.shape
            filled = weight.new_zeros(-(-out // PANEL) * PANEL, depth)
            filled[:out] = weight.detach()
            panels.append(filled.view(-1, PANEL, depth).transpose(1, 2))
        found.append(torch.cat(panels))
    return torch.stack(found).contiguous()
