"""Rotary position embedding as complex numbers have it."""

from __future__ import annotations

import torch


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Each pair of coordinates, as a complex number, times cos + i sin of its position and frequency."""
    shape = (-1, 2) if interleaved else (2, -1)
    first, second = x.unflatten(-1, shape).unbind(-1 if interleaved else -2)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
