"""Activations: sizes, bytes, peers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import activation
from kernels.activation import reference
from kernels.spec import Arguments, Case, Operation, tensor_bytes


def _case(*shape: int, dim: int = -1) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return {"input": 3 * torch.randn(shape, generator=generator).to(dtype), "dim": dim}

    return Case("x".join(map(str, shape)) + ("" if dim == -1 else f" dim {dim}"), make)


def _bytes(arguments: Arguments, backward: bool) -> int:
    return (3 if backward else 2) * tensor_bytes(arguments["input"])


OPERATIONS = [
    Operation(
        name="softmax",
        function=activation.softmax,
        reference=reference.softmax,
        eager=F.softmax,
        cases=[
            _case(1, 1),
            _case(3, 17),
            _case(5, 1024),
            _case(2, 31, 127),
            _case(7, 13, dim=0),
            _case(2, 5, 900, dim=1),
            _case(0, 8),
            _case(4099, 3),
        ],
        sizes=[_case(8192, 1024)],
        bytes_moved=_bytes,
        gradients=("input",),
        targets={"forward": 1.15},
    )
]
