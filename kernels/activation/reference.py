"""Activations as the textbook has them."""

from __future__ import annotations

import math

import torch


def softmax(input: torch.Tensor, dim: int) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along ``dim``, shifted by the maximum so that exp cannot overflow."""
    shifted = input - input.amax(dim, keepdim=True) if input.numel() else input
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x Phi(x), or its approximation by tanh."""
    if approximate == "tanh":
        return input / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (input + 0.044715 * input**3)))
    return input / 2 * (1 + torch.erf(input / math.sqrt(2)))


def silu(input: torch.Tensor) -> torch.Tensor:
    """x / (1 + e**-x)."""
    return input / (1 + torch.exp(-input))


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x)."""
    return 1 / (1 + torch.exp(-input))


def tanh(input: torch.Tensor) -> torch.Tensor:
    """2 sigmoid(2 x) - 1."""
    return 2 * sigmoid(2 * input) - 1


def relu(input: torch.Tensor) -> torch.Tensor:
    """max(x, 0)."""
    return torch.where(input > 0, input, 0.0)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """x above 0, a fraction of it below."""
    return torch.where(input > 0, input, negative_slope * input)


def softplus(input: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    """ln(1 + e**(beta x)) / beta, and x where beta x > threshold."""
    scaled = beta * input
    return torch.where(scaled > threshold, input, torch.log1p(torch.exp(scaled.clamp(max=threshold))) / beta)


def elu(input: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """x above 0, alpha (e**x - 1) below."""
    return torch.where(input > 0, input, alpha * (torch.exp(input.clamp(max=0)) - 1))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return silu(gate) * up
