"""Ranks tell each other their sizes before they communicate: what does not fit is an error on every rank.

A collective whose ranks disagree about the size hangs, or aborts the process (gloo). Sizes are known to the
caller of a strategy, not to the transport, so one small all-gather asks for them first, and every rank sees
the same answer and raises the same error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from parallel.tensor_regions import Group, all_gather

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
"""A dtype travels as its place in here, -1 for any other."""

DIMENSIONS = 6


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


CHECK_BYTES = (1 + DIMENSIONS + 2) * 8
"""Of what a rank says of itself in ``check_fits``."""


def check_fits(
    tensor: torch.Tensor, wrong: str, split_dims: Sequence[int], what: str, group: Group = None
) -> None:
    """ValueError on every rank where this tensor does not fit its rank, or not those of the other ranks.

    wrong: what does not fit here, or nothing. split_dims: dimensions in which ranks may differ.
    """
    free = {dim % max(1, tensor.dim()) for dim in split_dims}
    code, dims, *shape = signature(tensor)
    shape = [0 if dim in free else size for dim, size in enumerate(shape)]
    rows = exchange([int(not wrong), code, dims, *shape], tensor.device, group)
    bad = [rank for rank, row in enumerate(rows) if not row[0]]
    if not wrong and bad:
        wrong = f"{what} does not fit on rank {bad[0]}, which says how"
    elif not wrong and any(row != rows[0] for row in rows):
        wrong = f"{what} must be the same on every rank of the group (0: may differ); " + "; ".join(
            f"rank {rank} has {described(row[1:])}" for rank, row in enumerate(rows)
        )
    if wrong:
        raise ValueError(wrong)


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
