"""What a model in a smaller form stands for, computed in float64: the reference of every proof of this
lab."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from labs.models.gpt import GPT
from labs.precision.compress import sharing


class _InFloat64(nn.Module):
    """A linear layer whose weight is widened for each call: all of them at once would not fit the memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._hidden = (layer,)  # not a child, so that its tensors stay as they are

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self._hidden[0]
        weight = layer.exact() if hasattr(layer, "exact") else layer.weight.detach().double()
        return F.linear(x, weight, None if layer.bias is None else layer.bias.detach().double())


def in_float64(model: GPT) -> GPT:
    """The same function in float64, of the weights as they are stored."""
    made = sharing(model)
    _widen(made.blocks)
    for module in made.modules():
        module._parameters = {
            name: tensor if tensor is None else nn.Parameter(tensor.detach().double(), requires_grad=False)
            for name, tensor in module._parameters.items()
        }
    made.head.weight = made.embedding.tokens.weight
    return made


def _widen(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) or hasattr(child, "exact"):
            setattr(module, name, _InFloat64(child))
        else:
            _widen(child)
