"""How x lies in memory, and the loops that go through it in that order."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def empty_result(x: torch.Tensor) -> torch.Tensor:
    """Memory for the result, laid out as x where a row of x is contiguous."""
    out = torch.empty_like(x)
    if x.dim() > 4 or out.stride(-1) != 1:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out


def four_dimensions(x: torch.Tensor) -> torch.Tensor:
    """x as (batch, heads, length, dim), its rows contiguous; a copy where it must be."""
    if x.dim() > 4 or x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 4:
        return x
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def loops_of(
    shape: Sequence[int], source: Sequence[int], target: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """(extent, stride in source, in target, in the tables) of the loops over rows, as target lies in memory:
    from the four dimensions of both, and their strides.
    """
    pairs = shape[-1] // 2
    loops = [(shape[axis], source[axis], target[axis], pairs if axis == 2 else 0) for axis in range(3)]
    return sorted(loops, key=lambda loop: -loop[2])
