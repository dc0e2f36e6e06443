"""Rotary position embedding as complex numbers have it."""

from __future__ import annotations

import torch


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Each pair of coordinates, as a complex number, times cos + i sin of its position and frequency."""
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
    else:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    pairs = torch.view_as_real(turned)
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)
