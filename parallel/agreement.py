"""Ranks tell each other their sizes before they communicate: what does not fit is an error on every rank.

A collective whose ranks disagree about the size hangs, or aborts the process (gloo). Sizes are known to the
caller of a strategy, not to the transport, so one small all-gather asks for them first, and every rank sees
the same answer and raises the same error.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from parallel.tensor_regions import Group, all_gather

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
"""A dtype travels as its place in here, -1 for any other."""

DIMENSIONS = 6

BUCKET_BYTES = 1 << 26
"""Tensors up to this size together are broadcast in one call."""


def exchange(numbers: Sequence[int], device: torch.device, group: Group = None) -> list[list[int]]:
    """Every rank's ``numbers``, by rank. Each rank gives equally many; they travel as int64."""
    world = dist.get_world_size(group)
    if world == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = own.new_empty(world * len(own))
    all_gather(gathered, own, group=group)
    return gathered.view(world, -1).tolist()


def signature(tensor: torch.Tensor) -> list[int]:
    """dtype, number of dimensions and shape, as DIMENSIONS + 2 numbers."""
    shape = list(tensor.shape)[:DIMENSIONS]
    code = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else -1
    return [code, tensor.dim(), *shape, *[0] * (DIMENSIONS - len(shape))]


def described(numbers: Sequence[int]) -> str:
    """A signature, as text."""
    dtype = "another dtype" if numbers[0] < 0 else str(DTYPES[numbers[0]]).removeprefix("torch.")
    return f"{tuple(numbers[2 : 2 + numbers[1]])} {dtype}"


def check_same(tensors: Sequence[torch.Tensor], what: str, group: Group = None) -> None:
    """ValueError on every rank unless all have tensors of the same shapes and dtypes."""
    mine = [number for tensor in tensors for number in signature(tensor)]
    found = exchange(mine, tensors[0].device, group)
    if any(other != found[0] for other in found):
        width = DIMENSIONS + 2
        texts = [
            " and ".join(described(row[at : at + width]) for at in range(0, len(row), width)) for row in found
        ]
        raise ValueError(
            f"{what} must be the same on every rank of the group; "
            + "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(texts))
        )


def broadcast_module(module: nn.Module, group: Group = None) -> None:
    """Give every rank the parameters and buffers of the group's first rank, so that all start from the same.

    Tensors on the meta device have none. ValueError on every rank: modules that differ in their tensors.
    """
    if dist.get_world_size(group) == 1:
        return
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta]
    shapes = ";".join(described(signature(tensor)) for tensor in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    elements = sum(tensor.numel() for tensor in tensors)
    rows = exchange([len(tensors), elements, zlib.crc32(shapes.encode())], device, group)
    if any(row != rows[0] for row in rows):
        raise ValueError(
            "the module must have tensors of the same shapes and dtypes on every rank; "
            + "; ".join(f"rank {rank} has {row[0]}, {row[1]} elements" for rank, row in enumerate(rows))
        )
    first = dist.get_process_group_ranks(group or dist.group.WORLD)[0]
    for kind in {(tensor.dtype, tensor.device): None for tensor in tensors}:  # in the order of the module
        alike = [tensor.detach() for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        while alike:
            bucket: list[torch.Tensor] = []
            size = 0
            while alike and (not bucket or size + alike[0].nbytes <= BUCKET_BYTES):
                size += alike[0].nbytes
                bucket.append(alike.pop(0))
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, first, group=group)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
