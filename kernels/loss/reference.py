"""Losses as the textbook has them."""

from __future__ import annotations

import torch


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-sum_j q_j log softmax(input)_j a row; q is 1 - s at the target plus s / classes everywhere."""
    classes = input.shape[-1]
    logits, labels = input.reshape(-1, classes), target.reshape(-1)
    top = logits.amax(-1, keepdim=True) if logits.numel() else logits
    log_probability = logits - top - (logits - top).exp().sum(-1, keepdim=True).log()
    kept = labels != ignore_index
    picked = log_probability.gather(1, labels.where(kept, 0)[:, None])[:, 0]
    losses = -(1 - label_smoothing) * picked - label_smoothing * log_probability.mean(-1)
    losses = losses.where(kept, 0.0)
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None = None,
    **options: object,
) -> torch.Tensor:
    """cross_entropy(input @ linear_weight.T + linear_bias, target)."""
    logits = input @ linear_weight.T
    return cross_entropy(logits if linear_bias is None else logits + linear_bias, target, **options)  # type: ignore[arg-type]
