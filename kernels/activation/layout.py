"""Elements in the order in which they lie in memory: elementwise work needs no other."""

from __future__ import annotations

import torch


def like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its elements laid out as those of ``example``, an ``empty_like``; copied if they are
    not.
    """
    if tensor.stride() == example.stride() or tensor.numel() == 0:
        return tensor
    return torch.empty_like(example).copy_(tensor)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in memory order, without a copy. The tensor fills its memory, as any ``empty_like``
    does.
    """
    return tensor.as_strided((tensor.numel(),), (1,))


def rows_of(tensor: torch.Tensor, columns: int) -> tuple[torch.Tensor, int]:
    """Rows of ``columns`` elements and the stride between them: (flat memory, stride). Copied where it must
    be.

    ``columns`` is the last dimension or, of a contiguous tensor, all of it. One half of ``x.chunk(2, -1)``
    is read where it lies.
    """
    if tensor.is_contiguous():
        return tensor.view(-1), columns
    rows = tensor.numel() // max(1, columns)
    try:
        grid = tensor.view(rows, columns)
    except RuntimeError:  # no single stride leads from row to row
        return tensor.contiguous().view(-1), columns
    if rows == 0 or columns == 0 or grid.stride(1) != 1 or grid.stride(0) < 0:
        return tensor.contiguous().view(-1), columns
    return grid.as_strided(((rows - 1) * grid.stride(0) + columns,), (1,)), grid.stride(0)
