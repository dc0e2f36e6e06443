"""The variance that each parameter starts with, and setting it.

A matrix of n inputs and m outputs is drawn from a normal distribution of variance
  gpt2     0.02^2, and 0.02^2 / N where its output is added to the residual stream, N such sums in the stack:
           the stream's variance then does not grow with depth (Radford et al. 2019, section 2.3);
  xavier   2 / (n + m): what passes through a linear layer keeps its variance forwards and backwards on
           average (Glorot and Bengio 2010, equation 16);
  kaiming  2 / n: the mean square is kept through ReLU, which halves it (He et al. 2015, equation 10).
Tables that are looked up have no inputs: in every scheme 0.02^2 for tokens and 0.01^2 for positions (GPT-2's
code); 1 / width for tokens that are scaled by sqrt(width) before sinusoids are added. A tied head is such a
table. Biases start at 0, the weights of norms at 1.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import nn

from labs.models.configuration import BlockConfig
from labs.models.layers import Embedding

RESIDUAL = ("attention.output", "cross_attention.output", "feed_forward.down")
"""Linear layers of a block whose outputs are added to the residual stream."""


def variances(model: nn.Module, config: BlockConfig) -> dict[str, float]:
    """Parameter name -> the variance it is drawn with; 0 for biases and the weights of norms."""
    promised = {name: 0.0 for name, _ in model.named_parameters()}  # of tied ones the first name only
    names = [name for name, _ in model.named_modules()]
    sums = Counter(_stack(name) for name in names if name.endswith(RESIDUAL))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in promised:
            depth = sums[_stack(name)] if name.endswith(RESIDUAL) else 1
            promised[f"{name}.weight"] = _of_matrix(config, module, depth)
        elif isinstance(module, Embedding):
            if f"{name}.tokens.weight" in promised:
                scaled = config.positions == "sinusoidal"
                promised[f"{name}.tokens.weight"] = 1 / config.width if scaled else 0.02**2
            if module.positions is not None:
                promised[f"{name}.positions.weight"] = 0.01**2
    return promised


def _stack(name: str) -> str:
    """What stands before the list of blocks that a layer belongs to: "", "encoder." or "decoder."."""
    return name.rpartition("blocks.")[0]


def _of_matrix(config: BlockConfig, layer: nn.Linear, sums: int) -> float:
    if config.initialization == "xavier":
        return 2 / (layer.in_features + layer.out_features)
    if config.initialization == "kaiming":
        return 2 / layer.in_features
    return 0.02**2 / sums


@torch.no_grad()
def initialize(model: nn.Module, config: BlockConfig, generator: torch.Generator | None = None) -> None:
    """Draws every parameter of ``model`` in place, in the order of ``named_parameters``."""
    promised = variances(model, config)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue  # there is no memory yet to draw into
        if promised[name]:
            nn.init.normal_(parameter, std=math.sqrt(promised[name]), generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
