"""What a rank holds, counted as live storages while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from labs.data_parallel.training import Training

PARTS = ("parameters", "gradients", "optimizer", "activations")


def held(training: Training) -> dict[str, int]:
    """Bytes of each of ``PARTS`` between backward and update, activations between forward and backward.

    Trains one step. The optimizer must have made one before, since its state comes with the first.
    """
    import torch

    from parallel.memory_held import held_bytes

    training.optimizer.zero_grad()
    kept: dict[int, torch.UntypedStorage] = {}
    batch = training.drawn[training.steps % len(training.drawn)]
    data = {tensor.untyped_storage()._cdata for tensor in batch}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weights = {p.untyped_storage()._cdata for p in training.model.parameters()}  # whole ones come and go
        if storage._cdata not in data | weights:
            kept[storage._cdata] = storage  # held, so that no other can stand there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.loss()
    activations = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    loss.backward()
    found = {
        "parameters": held_bytes(training.model.parameters()),
        "gradients": held_bytes(_gradients(training)),
        "optimizer": held_bytes(_state(training.optimizer)),
        "activations": activations,
    }
    training.optimizer.step()
    return found


def _gradients(training: Training) -> Iterator[torch.Tensor]:
    if getattr(training.optimizer, "stage", 0) == 2:
        yield from (bucket.gradient for bucket in training.optimizer.buckets)
    yield from (p.grad for p in training.model.parameters() if p.grad is not None)


def _state(optimizer: Any) -> Iterator[torch.Tensor]:
    import torch

    inner = getattr(optimizer, "optim", optimizer)
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
