"""Buckets: gradients that travel together while backward still computes the others.

One collective for each parameter would pay the latency of the link hundreds of times; one for all of them
could start only when backward has ended. Between the two lie buckets of some megabytes, filled in the reverse
order of use, each sent as soon as its last gradient is there (Li et al., "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training", VLDB 2020, section 3.2). ``reducer.py`` fills and sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MEBIBYTE = 1 << 20
CAP_MB, FIRST_BYTES = 25.0, MEBIBYTE  # torch's: a small first bucket lets communication begin early


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()


def kind_of(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    """What tensors of one bucket have in common."""
    return tensor.dtype, tensor.device


def limits(bucket_cap_mb: float | None) -> tuple[int, int]:
    """(bytes of the first bucket, bytes of the others). None: 1 MiB and 25 MiB; else both what is given."""
    if bucket_cap_mb is None:
        return FIRST_BYTES, int(CAP_MB * MEBIBYTE)
    if bucket_cap_mb <= 0:
        raise ValueError(f"bucket_cap_mb is {bucket_cap_mb}; it must be above 0 (MiB)")
    return int(bucket_cap_mb * MEBIBYTE), int(bucket_cap_mb * MEBIBYTE)


def assign(tensors: Sequence[torch.Tensor], first_bytes: int, cap_bytes: int) -> list[list[int]]:
    """Indices of the tensors of each bucket: filled in the order given until it holds the limit or more.

    A bucket has one dtype and device. (What torch.distributed._compute_bucket_assignment_by_size returns.)
    """
    closed: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    limit: dict[tuple[torch.dtype, torch.device], int] = {}
    for index, tensor in enumerate(tensors):
        kind = kind_of(tensor)
        indices, filled = open_.pop(kind, ([], 0))
        indices.append(index)
        filled += bytes_of(tensor)
        if filled >= limit.setdefault(kind, first_bytes):
            closed.append(indices)
            limit[kind] = cap_bytes
        else:
            open_[kind] = indices, filled
    return sorted(closed + [indices for indices, _ in open_.values()])


class Slot:
    """A parameter's place in a bucket."""

    __slots__ = ("bucket", "name", "offset", "param", "ready", "used", "view")

    def __init__(self, name: str, param: torch.Tensor) -> None:
        self.name, self.param = name, param
        self.ready = False  # its gradient is in the bucket
        self.used = True  # by some rank
        self.bucket: Bucket
        self.offset = 0  # elements, in the bucket
        self.view = torch.empty(0)  # (param's shape) in the bucket, where it has memory of its own


class Bucket:
    """Gradients that are communicated together, laid one after the other."""

    __slots__ = ("elements", "index", "pending", "slots", "work")

    def __init__(self, index: int, slots: Sequence[Slot]) -> None:
        self.index, self.slots, self.pending = index, list(slots), len(slots)
        self.work: Any = None
        self.elements = 0
        for slot in self.slots:
            slot.bucket, slot.offset = self, self.elements
            self.elements += slot.param.numel()

    def __str__(self) -> str:
        names = " ... ".join(dict.fromkeys((self.slots[0].name, self.slots[-1].name)))
        size = self.elements * self.slots[0].param.element_size()
        return f"gradient bucket {self.index} ({names}, {size} bytes)"
