"""Models in files (safetensors), in the form they are kept in.

Quantised weights are integers and scales; pruned ones, where ``masks`` is set, a bit a weight and the values
of those that are left. What is read back is equal bit for bit, and quality is judged on what was read back.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import numpy
import torch
from torch import nn

from labs.models.trained import load, named_tensors, save

M = TypeVar("M", bound=nn.Module)
MASK, VALUES = ".mask", ".values"


def write(model: nn.Module, path: Path, masks: bool = False) -> int:
    """Bytes of the tensors in the file, its header not counted."""
    tensors = named_tensors(model)
    if masks:
        for name in [name for name in tensors if _is_matrix(name)]:
            weight = tensors.pop(name)
            bits = numpy.packbits((weight != 0).flatten().numpy())
            tensors[name + MASK], tensors[name + VALUES] = torch.from_numpy(bits), weight[weight != 0]
    save(path, tensors, {"masks": masks})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read(form: M, path: Path) -> M:
    """A model of ``form``'s modules with the file's tensors. ValueError: the file is not of this form."""
    kept = load(path)
    if kept is None:
        raise ValueError(f"{path} is no file of a model")
    tensors, _ = kept
    made = copy.deepcopy(form)
    named = dict(made.named_parameters()) | dict(made.named_buffers())
    for name in [name for name in tensors if name.endswith(MASK)]:
        whole = name.removesuffix(MASK)
        mask, values = tensors.pop(name), tensors.pop(whole + VALUES)
        bits = numpy.unpackbits(mask.numpy(), count=named[whole].numel()).astype(bool)
        tensors[whole] = torch.zeros_like(named[whole])
        tensors[whole].view(-1)[torch.from_numpy(bits)] = values
    if set(named) != set(tensors):
        different = sorted(set(named) ^ set(tensors))
        raise ValueError(f"{path} holds a model of another form: {different[0]} is only in one of them")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if named[name].shape != tensor.shape or named[name].dtype != tensor.dtype:
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the form's {named[name].dtype} "
                    f"{tuple(named[name].shape)}"
                )
            named[name].copy_(tensor)
    return made


def _is_matrix(name: str) -> bool:
    """A weight of a block's linear layer."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
