"""Whole tensors from the shards of a tensor-parallel model, and back: state dicts, gradients, moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from parallel.tensor_regions import start_all_gather


def full_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole of ``tensors``, on every rank: name of a parameter -> its shard, or its gradient, or a
    moment.

    What is not split comes as it is.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    whole = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        layer = layers[owner]
        place = layer.shards().get(last) if hasattr(layer, "shards") else None
        if place is None:
            whole[name] = tensor.detach()
        else:
            whole[name] = start_all_gather(tensor.detach(), place[0], place[1], layer.group)()
    return whole


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the module had before ``parallelize``, on every rank."""
    return full_tensors(module, module.state_dict())


def local_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``full_tensors``: this rank's shards of whole tensors. Nothing is communicated."""
    layers = dict(module.named_modules(remove_duplicate=False))
    own = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        layer = layers.get(owner, module)
        place = layer.shards().get(last) if hasattr(layer, "shards") else None
        own[name] = tensor if place is None else place[0].take(tensor, layer.rank, place[1])
    return own


def load_full_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take this rank's shards from a whole state dict, such as ``full_state_dict`` at another world size."""
    module.load_state_dict(local_tensors(module, state))
