"""What ``ZeroRedundancyOptimizer`` communicates and holds, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from parallel.buckets import bytes_of
from parallel.memory_held import Memory
from parallel.shards import cut, layout, padded


def predict_communication(
    params: Iterable[torch.Tensor],
    world_size: int,
    stage: int = 1,
    backwards: int = 1,
    bucket_cap_mb: float | None = None,
) -> dict[str, int]:
    """Payload bytes of one step of one rank, of one parameter group.

    all_gather: the parameters with their padding; reduce_scatter, in stage 2: as much for each of
        ``backwards`` outside ``no_sync``. Stage 1's gradients are ``data.predict_communication``.
    One rank communicates nothing.
    """
    if world_size == 1:
        return {}
    flat = sum(_flat_bytes(params, world_size, bucket_cap_mb))
    return {"all_gather": flat} | ({"reduce_scatter": flat * backwards} if stage == 2 else {})


def _flat_bytes(params: Iterable[torch.Tensor], world_size: int, bucket_cap_mb: float | None) -> list[int]:
    trainable = [param for param in params if param.requires_grad]
    return [
        padded(sum(trainable[i].numel() for i in bucket), world_size) * trainable[bucket[0]].element_size()
        for bucket in layout(trainable, bucket_cap_mb)
    ]


def predict_memory(
    params: Iterable[torch.Tensor],
    optimizer_class: type[Optimizer],
    world_size: int,
    rank: int = 0,
    stage: int = 1,
    bucket_cap_mb: float | None = None,
    **defaults: Any,
) -> Memory:
    """Bytes that ``rank`` holds between steps, of one parameter group, when every parameter had a gradient.

    Gradients are those of ``DistributedDataParallel`` in stage 1 and the rank's ranges in stage 2, which has
    two buffers of the largest bucket besides. At the peak of a step there are more: a gradient on its way to
    its bucket in stage 1, the gradients of a bucket that is not full yet in stage 2. Over gloo also its own
    copies, of two buckets at most at once, which its threads free late; they are not predicted.
    """
    params = list(params)
    trainable = [param for param in params if param.requires_grad]
    states, scalars = _states(optimizer_class, defaults)
    scalar_bytes = 8 if torch.get_default_dtype() is torch.float64 else 4
    state = 0
    for bucket in layout(trainable, bucket_cap_mb):
        sizes = [trainable[index].numel() for index in bucket]
        share = padded(sum(sizes), world_size) // world_size
        pieces = cut(sizes, share * rank, share * (rank + 1))
        elements = sum(last - first for _, first, last in pieces)
        state += (
            elements * states * trainable[bucket[0]].element_size() + len(pieces) * scalars * scalar_bytes
        )
    flats = _flat_bytes(params, world_size, bucket_cap_mb)
    return Memory(
        parameters=sum(flats) + sum(bytes_of(param) for param in params if not param.requires_grad),
        gradients=sum(map(bytes_of, trainable)) if stage == 1 else sum(flats) // world_size,
        optimizer=state,
        buffers=0 if stage == 1 else max(flats) * min(len(flats), 2),
    )


def _states(optimizer_class: type[Optimizer], defaults: dict[str, Any]) -> tuple[int, int]:
    """(tensors as large as the parameter, scalars) of the state of each parameter."""
    momentum = bool(defaults.get("momentum"))
    for kind, tensors, scalars in (
        (torch.optim.SGD, int(momentum), 0),
        (torch.optim.Adam, 2 + bool(defaults.get("amsgrad")), 1),  # and AdamW
        (torch.optim.NAdam, 2, 2),
        (torch.optim.RAdam, 2, 1),
        (torch.optim.Adamax, 2, 1),
        (torch.optim.Adadelta, 2, 1),
        (torch.optim.Adagrad, 1, 1),
        (torch.optim.RMSprop, 1 + momentum + bool(defaults.get("centered")), 1),
        (torch.optim.Rprop, 2, 1),
    ):
        if issubclass(optimizer_class, kind):
            return tensors, scalars
    raise ValueError(f"the state of {optimizer_class.__name__} is not known: no formula")
