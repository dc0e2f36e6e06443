"""Activations as the textbook has them."""

from __future__ import annotations

import torch


def softmax(input: torch.Tensor, dim: int) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along ``dim``, shifted by the maximum so that exp cannot overflow."""
    shifted = input - input.amax(dim, keepdim=True) if input.numel() else input
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim, keepdim=True)
