"""``matmul_bf16`` on the CPU: on AMX tiles or VDPBF16PS, whichever this CPU has; else torch's own."""

from __future__ import annotations

import torch

from kernels.matmul import cpu_amx, cpu_product
from kernels.matmul.cpu_tile import dot_tile, has_dots


def matmul_bf16(a: torch.Tensor, b: torch.Tensor, transpose_a: bool, transpose_b: bool) -> torch.Tensor:
    """The product of contiguous bfloat16 matrices, either given transposed; float32 sums, rounded once."""
    m, n = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
    tiles = cpu_amx.usable()
    if not tiles and not has_dots():
        return torch.mm(a.t() if transpose_a else a, b.t() if transpose_b else b)
    out = torch.empty((m, n), dtype=torch.bfloat16)
    if tiles:
        return cpu_amx.product(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b)
    return cpu_product.product(dot_tile(), a, b, out, transpose_a=transpose_a, transpose_b=transpose_b)
