"""``linear`` with quantised weights on the CPU: inner products for few rows, a blocked product for many.

Either way a weight is widened in registers or in a block that stays in cache; the weights are never written
out as floats. Sums are float32. Integer weights are exact in bfloat16: where there are AMX tiles they meet
activations of any dtype there (``cpu_amx_pack``: a float32 is the sum of three bfloat16), and bfloat16
activations meet them in VDPBF16PS where there is that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.matmul import cpu_amx, cpu_dots, cpu_tile
from kernels.matmul.cpu_product import product
from kernels.simd import full_width
from kernels.threads import chunked, chunks_of

f32 = np.float32
FEW_ROWS = 12  # of activations: up to here inner products are faster than packing the weights

_one_int8, _four_int8 = cpu_dots.dots_int8(1), cpu_dots.dots_int8(4)
_one_int4, _four_int4 = cpu_dots.dots_int4(1), cpu_dots.dots_int4(4)
_pairs_int4 = cpu_dots.dots_int4_pairs
_TILE = cpu_dots.WEIGHT_ROWS


@chunked
def _few_int8(chunk, chunks, x, weight, scale, bias, out):
    full_width()
    m, k = x.shape
    n = weight.shape[0]
    sums = np.empty(4 * _TILE, np.float32)
    tiles = (n + _TILE - 1) // _TILE
    for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
        first = tile * _TILE
        i = 0
        while i < m:
            rows = 1 if m == 1 else min(4, m - i)
            if rows == 1:
                _one_int8(x, i, weight, first, sums)
            else:
                _four_int8(x, i, weight, first, sums)
            for r in range(rows):
                for j in range(min(_TILE, n - first)):
                    total = sums[r * _TILE + j]
                    for c in range(k // 16 * 16, k):
                        total += x[i + r, c] * f32(weight[first + j, c])
                    out[i + r, first + j] = total * scale[first + j, 0] + bias[first + j]
            i += rows


@chunked
def _few_int4(chunk, chunks, x, weight, scale, bias, out):
    full_width()
    m, k = x.shape
    n = weight.shape[0]
    group = k // max(1, scale.shape[1])
    sums = np.empty(4 * _TILE, np.float32)
    tiles = (n + _TILE - 1) // _TILE
    for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
        first = tile * _TILE
        i = 0
        while i < m:
            rows = 1 if m == 1 else min(4, m - i)
            if rows == 1:
                _one_int4(x, i, weight, first, scale, group, sums)
            else:
                _four_int4(x, i, weight, first, scale, group, sums)
            for r in range(rows):
                for j in range(min(_TILE, n - first)):
                    out[i + r, first + j] = sums[r * _TILE + j] + bias[first + j]
            i += rows


@chunked
def _one_int4_pairs(chunk, chunks, x, weight, scale, bias, out):
    full_width()
    n = weight.shape[0]
    group = x.shape[1] // max(1, scale.shape[1])
    sums = np.empty(_TILE, np.float32)
    tiles = (n + _TILE - 1) // _TILE
    for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
        first = tile * _TILE
        _pairs_int4(x, weight, first, scale, group, sums)
        for j in range(min(_TILE, n - first)):
            out[0, first + j] = sums[j] + bias[first + j]


def _linear(bits: int, input: torch.Tensor, weight: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    rows, in_features, out_features = input.shape[:-1].numel(), input.shape[-1], len(weight)
    x = input.view(rows, in_features)
    bias = torch.zeros(out_features, dtype=torch.float32) if bias is None else bias.float()
    if rows <= FEW_ROWS:
        out = torch.empty((rows, out_features), dtype=torch.float32)
        chunks = chunks_of(-(-out_features // _TILE), 1 + 4096 // max(1, in_features)) if rows else 0
        groups = scale.shape[1]
        pairs = bits == 4 and rows == 1 and x.dtype is torch.bfloat16 and cpu_dots.PAIRS
        if pairs and groups and in_features % (128 * groups) == 0:
            x, body = cpu_dots.arranged_for_pairs(x, groups), _one_int4_pairs
        else:
            x, body = x.float(), _few_int8 if bits == 8 else _few_int4
        body(chunks, chunks, x, weight, scale, bias, out)
        return out.to(input.dtype).view(*input.shape[:-1], out_features)
    weight = weight.view(torch.int8)
    pairs = x.dtype is torch.bfloat16
    if cpu_amx.usable():
        out = torch.empty((rows, out_features), dtype=x.dtype if pairs else torch.float32)
        cpu_amx.product(x, weight, out, transpose_b=True, bits=bits, scale=scale, bias=bias)
    else:
        tile = cpu_tile.dot_tile() if pairs and cpu_tile.has_dots() else cpu_tile.fma_tile()
        x = x if tile.pair == 2 else x.float()
        out = torch.empty((rows, out_features), dtype=x.dtype)
        product(tile, x, weight, out, transpose_b=True, bits=bits, scale=scale, bias=bias)
    return out.to(input.dtype).view(*input.shape[:-1], out_features)


def _grad_input(bits: int, grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, in_features = grad.shape[:-1].numel(), weight.shape[1] * (8 // bits)
    out = torch.empty((rows, in_features), dtype=torch.float32)
    tile = cpu_tile.fma_tile()  # weights with their scale are no bfloat16 numbers
    weight = weight.view(torch.int8)
    product(tile, grad.float().view(rows, len(weight)), weight, out, bits=bits, scale=scale)
    return out.to(grad.dtype).view(*grad.shape[:-1], in_features)


def linear_int8(
    input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """input (..., in), weight (out, in) int8, scale (out,) float32, bias (out,) or None; contiguous."""
    return _linear(8, input, weight, scale[:, None], bias)


def linear_int4(
    input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """input (..., in), weight (out, in / 2) uint8, scale (out, groups), bias (out,) or None; contiguous."""
    return _linear(4, input, weight, scale, bias)


def linear_int8_backward(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of the input: grad (..., out) @ dequantised weight."""
    return _grad_input(8, grad, weight, scale[:, None])


def linear_int4_backward(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of the input: grad (..., out) @ dequantised weight."""
    return _grad_input(4, grad, weight, scale)
