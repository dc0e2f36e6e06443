"""What a transformer is built from beside attention: embedding, norms, feed-forward, and the block of them.

Sources: Ba et al. 2016 (LayerNorm); Zhang and Sennrich 2019 (RMSNorm); Hendrycks and Gimpel 2016 (GELU);
Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU); Xiong et al. 2020 (pre- and post-norm).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from labs.models.attention import Attention, KeyValueCache
from labs.models.configuration import BlockConfig
from labs.models.positions import Rotation, sinusoids


class LayerNorm(nn.LayerNorm):
    """torch's, by the configured namespace's function."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config.width, config.norm_epsilon, bias=config.bias)
        self.normalize = importlib.import_module(config.functional).layer_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, by the configured namespace's function."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config.width, config.norm_epsilon)
        self.normalize = importlib.import_module(config.functional).rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x, self.normalized_shape, self.weight, self.eps)


def norm(config: BlockConfig) -> nn.Module:
    return LayerNorm(config) if config.norm == "layer" else RMSNorm(config)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    return nn.functional.silu(gate) * up


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) with SwiGLU; each token by itself."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        functional = importlib.import_module(config.functional)
        self.activate = {
            "gelu": functional.gelu,
            "gelu_tanh": partial(functional.gelu, approximate="tanh"),
            "relu": functional.relu,
            "swiglu": getattr(functional, "swiglu", swiglu),  # torch has none
        }[config.activation]
        hidden = config.size_of_hidden
        self.gate = nn.Linear(config.width, hidden, config.bias) if config.activation == "swiglu" else None
        self.up = nn.Linear(config.width, hidden, config.bias)
        self.down = nn.Linear(hidden, config.width, config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(self.activate(self.up(x)))
        return self.down(self.activate(self.gate(x), self.up(x)))


class Embedding(nn.Module):
    """Tokens (batch, length) to states (batch, length, width), with what is added for their positions."""

    def __init__(self, config: BlockConfig, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context, config.width) if learned else None
        self.sinusoidal = config.positions == "sinusoidal"
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """positions: (length,), of every sequence of the batch."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.sinusoidal:
            x = x * math.sqrt(x.shape[-1]) + sinusoids(positions, x.shape[-1], x.dtype)
        return self.dropout(x)


Sublayer = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Attention, attention to a memory where ``cross``, feed-forward; a residual sum and a norm around each.

    Pre-norm: x + sublayer(norm(x)). Post-norm: norm(x + sublayer(x)).
    """

    def __init__(self, config: BlockConfig, causal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention_norm = norm(config)
        self.attention = Attention(config, causal)
        self.cross_attention_norm = norm(config) if cross else None
        self.cross_attention = Attention(config, causal=False) if cross else None
        self.feed_forward_norm = norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        memory_cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """(batch, length, width) to the same. mask, cache: of the self-attention; memory...: of the other."""

        def attend(y: torch.Tensor) -> torch.Tensor:
            return self.attention(y, mask=mask, rotation=rotation, cache=cache)

        x = self._residual(x, self.attention_norm, attend)
        cross = self.cross_attention
        if cross is not None:
            if memory is None:
                raise ValueError("a block with cross-attention needs memory, the states it attends to")

            def look(y: torch.Tensor) -> torch.Tensor:
                return cross(y, memory, memory_mask, cache=memory_cache)

            x = self._residual(x, self.cross_attention_norm, look)
        return self._residual(x, self.feed_forward_norm, self.feed_forward)

    def _residual(self, x: torch.Tensor, norm: nn.Module, sublayer: Sublayer) -> torch.Tensor:
        if self.pre:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))
