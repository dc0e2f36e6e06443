"""Tensors as the exchanges of ``parallel.shm`` see them: addresses, bytes, parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from parallel.shm_exchange import LINE
from parallel.shm_reduce import supported


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements in order, in memory that can be read by address."""
    if not tensor.is_cpu:
        raise ValueError(f"shm takes tensors of the CPU, not of {tensor.device}; gloo or nccl take those")
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.trigger_wait()
    return tensor.resolve_conj().resolve_neg().contiguous()


def room_for(tensor: torch.Tensor) -> torch.Tensor:
    """Where to write what ``put_back`` brings into the tensor."""
    if not tensor.is_cpu:
        raise ValueError(f"shm takes tensors of the CPU, not of {tensor.device}; gloo or nccl take those")
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return tensor if plain else torch.empty(tensor.shape, dtype=tensor.dtype)


def put_back(room: torch.Tensor, tensor: torch.Tensor) -> None:
    if room is not tensor:
        tensor.detach().copy_(room)


def place_of(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, bytes)."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def reducible(tensor: torch.Tensor, operation: tuple[str, float]) -> torch.Tensor:
    if tensor.is_complex() and operation[0] in ("SUM", "AVG", "PREMUL_SUM"):
        tensor = torch.view_as_real(tensor)
    other = supported(tensor.dtype, operation[0])
    if other is not None:
        raise TypeError(f"shm does not reduce {tensor.dtype} with {operation[0]}; it takes {other}")
    return tensor


def equal_parts(whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(whole.view(size, -1)) if whole.numel() else [whole.view(-1)] * size


def part_size(flat: torch.Tensor, size: int) -> int:
    """Elements of the part of each rank: equal but for the last, on borders of cache lines."""
    line = max(1, LINE // flat.element_size())
    return -(-flat.numel() // (size * line)) * line


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
