"""What a rank holds, by purpose, and the bytes behind given tensors.

(``parallel.memory`` counts what is allocated meanwhile, and its import slows torch's allocator down.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds, by purpose. buffers: what a strategy allocates to communicate, at most."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once however many views share it.

    A DTensor or another wrapper counts as what it holds on this rank.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        if storage.nbytes():
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
