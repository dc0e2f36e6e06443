"""Smaller forms of a GPT. Each function returns a new model that shares what it does not change.

quantized     weight-only int8 (a scale a row) or int4 (a scale a group)
halved        everything in bfloat16
pruned        the smallest weights of each matrix are zero (unstructured)
structured    whole heads and hidden neurons are gone: a smaller dense model
low_rank      each matrix as a product of two thin ones
adapted       LoRA beside each matrix, to train and then to merge
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from labs.models.gpt import GPT
from labs.precision import layers

M = TypeVar("M", bound=nn.Module)


def sharing(module: M) -> M:
    """A module of the same tensors, whose layers can be replaced without touching the first's."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._modules = {name: child and sharing(child) for name, child in module._modules.items()}
    return made


def quantized(model: GPT, bits: int, group: int) -> GPT:
    made = sharing(model)
    layers.replace_linear(made, partial(layers.QuantizedLinear.from_linear, bits=bits, group=group))
    return made


def halved(model: GPT) -> GPT:
    """Weights, activations and cache in bfloat16."""
    with torch.device("meta"):
        made = GPT(model.config)
    made.load_state_dict({name: t.bfloat16() for name, t in model.state_dict().items()}, assign=True)
    made.head.weight = made.embedding.tokens.weight  # tied again
    return made.eval()


def pruned(model: GPT, sparsity: float) -> GPT:
    """Dense, with zeros: fewer numbers to store, as many to read."""

    def zeroed(linear: nn.Linear) -> nn.Linear:
        kept = layers.kept_by_magnitude(linear.weight, sparsity)
        return layers.with_weight(linear, linear.weight.detach() * kept)

    made = sharing(model)
    layers.replace_linear(made, zeroed)
    return made


def sparse(model: GPT, sparsity: float) -> GPT:
    """The same model with what is left as compressed rows."""
    made = sharing(model)
    layers.replace_linear(made, partial(layers.SparseLinear.from_linear, sparsity=sparsity))
    return made


def low_rank(model: GPT, share: float, random: bool = False) -> GPT:
    made = sharing(model)
    make = layers.LowRankLinear.random if random else layers.LowRankLinear.from_linear
    layers.replace_linear(made, partial(make, share=share))
    return made


def adapted(model: GPT, rank: int) -> GPT:
    made = sharing(model)
    layers.replace_linear(made, partial(layers.LoRALinear.from_linear, rank=rank))
    return made


def merged(model: GPT) -> GPT:
    """Every LoRA layer as one ordinary layer."""
    made = sharing(model)
    for parent in list(made.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layers.LoRALinear):
                setattr(parent, name, child.merged())
    return made


# --- structured ----------------------------------------------------------------------------------


def structured(model: GPT, keep: float) -> GPT:
    """The heads and hidden neurons of the largest norms; ``keep`` of each, at least one.

    A neuron's importance is |row of up| |column of down|, a head's |rows of value| |columns of output|: what
    it can add to the residual stream. The others' rows and columns are cut out. Source: Michel et al. 2019
    (heads); Li et al. 2017, section 3.1 (norms). ValueError: SwiGLU or shared key heads, which pair
    otherwise.
    """
    config = model.config
    if config.activation == "swiglu" or config.key_heads != config.heads:
        raise ValueError(
            "structured pruning is for a GPT without SwiGLU and with a key head for each query head"
        )
    heads, hidden = max(1, round(keep * config.heads)), max(1, round(keep * config.size_of_hidden))
    made = sharing(model)
    made.config = replace(config, heads=heads, kv_heads=None, head_dim=config.size_of_head, hidden=hidden)
    for block in made.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        rows = _largest(
            _head_norms(attention.value.weight, attention.output.weight, config.size_of_head), heads
        )
        rows = (rows[:, None] * config.size_of_head + torch.arange(config.size_of_head)).flatten()
        for name in ("query", "key", "value"):
            setattr(attention, name, _rows(getattr(attention, name), rows))
        attention.output = _columns(attention.output, rows)
        up, down = feed_forward.up, feed_forward.down
        rows = _largest(up.weight.detach().norm(dim=1) * down.weight.detach().norm(dim=0), hidden)
        feed_forward.up, feed_forward.down = _rows(up, rows), _columns(down, rows)
    return made


def _head_norms(value: torch.Tensor, output: torch.Tensor, size: int) -> torch.Tensor:
    rows = value.detach().unflatten(0, (-1, size)).flatten(1).norm(dim=1)
    columns = output.detach().t().unflatten(0, (-1, size)).flatten(1).norm(dim=1)
    return rows * columns


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    return importance.topk(count).indices.sort().values


def _rows(linear: nn.Linear, rows: torch.Tensor) -> nn.Linear:
    made = layers.with_weight(linear, linear.weight.detach()[rows])
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach()[rows])
    return made


def _columns(linear: nn.Linear, columns: torch.Tensor) -> nn.Linear:
    return layers.with_weight(linear, linear.weight.detach()[:, columns].contiguous())
