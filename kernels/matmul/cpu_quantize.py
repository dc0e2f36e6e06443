"""Rows of weights to integers on the CPU: the largest magnitude, then one rounding of each weight."""

from __future__ import annotations

import numpy as np
import torch

from kernels.simd import bits_as_float, float_as_bits, full_width
from kernels.storage import widen
from kernels.threads import chunked, chunks_of

f32 = np.float32
_ROUND = f32(
    12582912.0
)  # added and taken away, it rounds a float32 below 2**22 to the nearest integer, ties even


@chunked
def _groups(chunk, chunks, weight, levels, four, scale, out):
    """Integers -levels to levels; with ``four``, two in a byte as ``kernels.quantize_int4`` says.

    Magnitudes are compared by their bits, which are in the same order, infinity and NaN last: one integer
    instruction, and a scale that is not finite where the group holds such a value.
    """
    full_width()
    rows, groups = scale.shape
    group = weight.shape[1] // max(1, groups)
    half = group // 2
    line = np.empty(group, np.int32)
    most = f32(levels)
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        for g in range(groups):
            source = weight[i, g * group : (g + 1) * group]
            largest = np.int32(0)
            for j in range(group):
                largest = max(largest, float_as_bits(abs(widen(source[j]))))
            step = bits_as_float(largest) / most
            scale[i, g] = step
            for j in range(group):
                # Division, not a product with 1 / step: the nearest multiple of the scale that is stored.
                ratio = widen(source[j]) / step if step > f32(0) else f32(0)
                ratio = most if ratio > most else (-most if ratio < -most else ratio)
                line[j] = np.int32((ratio + _ROUND) - _ROUND)
            if four:
                target = out[i, g * half : (g + 1) * half]
                for j in range(half):
                    target[j] = (line[j] + np.int32(8)) | ((line[j + half] + np.int32(8)) << np.int32(4))
            else:
                target = out[i, g * group : (g + 1) * group]
                for j in range(group):
                    target[j] = line[j]


def _quantize(weight: torch.Tensor, group: int, levels: int, out: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    scale = torch.zeros((rows, columns // max(1, group)), dtype=torch.float32)
    if weight.numel():
        chunks = chunks_of(rows, 1 + 8192 // max(1, columns))
        _groups(chunks, chunks, weight, levels, levels == 7, scale, out)
    return scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), contiguous; see ``kernels.quantize_int8``."""
    rows, columns = weight.shape
    out = torch.empty((rows, columns), dtype=torch.int8)
    scale = (
        torch.zeros(rows, dtype=torch.float32)
        if columns == 0
        else _quantize(weight, columns, 127, out)[:, 0].contiguous()
    )
    return out, scale


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), contiguous, in a multiple of group_size; see ``kernels.quantize_int4``."""
    out = torch.empty((weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)
    return out, _quantize(weight, group_size, 7, out)
