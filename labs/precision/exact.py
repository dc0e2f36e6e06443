"""What a model in a smaller form stands for, computed in float64: the reference of this lab's proofs."""

from __future__ import annotations

from typing import Any

from torch import nn

from labs.models.gpt import GPT
from labs.precision.compress import sharing
from labs.precision.layers import with_weight


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


def of_copies(model: GPT) -> GPT:
    """``in_float64`` of a model whose blocks are equal: one is widened, as all would not fit the memory."""
    first = sharing(model)
    first.blocks = first.blocks[:1]
    made = in_float64(first)
    made.blocks = nn.ModuleList([made.blocks[0]] * len(model.blocks))
    return made


def _widen(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) or hasattr(child, "exact"):
            setattr(module, name, _widened(child))
        else:
            _widen(child)


def _widened(layer: Any) -> nn.Linear:
    return with_weight(layer, layer.exact() if hasattr(layer, "exact") else layer.weight.detach().double())
