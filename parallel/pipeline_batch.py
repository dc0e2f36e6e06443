"""A batch as micro-batches: what the first stage takes, and what the loss compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def split_batch(batch: Any, count: int, what: str) -> tuple[list[Any], list[int]]:
    """(``count`` micro-batches, how many samples each has).

    batch: a tensor or a tuple of tensors, cut along the first dimension as equally as it goes, the larger
    first; or a list of ``count`` such, which are the micro-batches. what: "inputs" or "targets".
    ValueError: fewer samples than micro-batches, or tensors of different lengths. TypeError: anything else.
    """
    if isinstance(batch, list):
        if len(batch) != count:
            raise ValueError(
                f"{what} is a list of {len(batch)} micro-batches; the schedule has {count} (a tuple of "
                "tensors is one batch)"
            )
        sizes = [_samples(one, what) for one in batch]
        if 0 in sizes:
            raise ValueError(f"{what}: micro-batch {sizes.index(0)} has no sample")
        return batch, sizes
    samples = _samples(batch, what)
    if samples < count:
        raise ValueError(
            f"{what} has {samples} samples for {count} micro-batches, which need one each at least"
        )
    if isinstance(batch, torch.Tensor):
        parts: list[Any] = list(torch.tensor_split(batch, count))
    else:
        parts = list(zip(*(torch.tensor_split(one, count) for one in batch), strict=True))
    return parts, [_samples(part, what) for part in parts]


def _samples(batch: Any, what: str) -> int:
    tensors: Sequence[Any] = batch if isinstance(batch, tuple) else (batch,)
    for one in tensors:
        if not isinstance(one, torch.Tensor) or not one.dim():
            raise TypeError(
                f"{what} must be a tensor, a tuple of tensors, or a list of micro-batches of them, with the "
                f"samples first; got {type(one).__name__}"
            )
    if not tensors or len({len(one) for one in tensors}) > 1:
        raise ValueError(
            f"the tensors of {what} must have as many samples each; they have "
            f"{', '.join(str(len(one)) for one in tensors) or 'none'}"
        )
    return len(tensors[0])
