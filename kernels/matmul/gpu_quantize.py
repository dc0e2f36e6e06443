"""Rows of weights to integers in Triton: the largest magnitude, then one rounding of each weight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # added and taken away, it rounds to the nearest integer, ties to even


@triton.jit
def _rounded(value, scale, LEVELS: tl.constexpr):
    """The nearest multiple of ``scale``, as an integer from -LEVELS to LEVELS."""
    ratio = tl.where(scale > 0, tl.div_rn(value, tl.where(scale > 0, scale, 1.0)), 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -LEVELS), LEVELS)
    return ((ratio + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def _int8(weight, out, scale, columns, BLOCK: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    odd = tl.zeros((BLOCK,), tl.float32)  # 0, or NaN where there is an infinity or a NaN
    for start in range(0, columns, BLOCK):
        value = tl.load(weight + row * columns + start + j, start + j < columns, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        odd += value - value
    step = tl.div_rn(tl.max(largest, 0) + tl.sum(odd, 0), 127.0)
    tl.store(scale + row, step)
    for start in range(0, columns, BLOCK):
        value = tl.load(weight + row * columns + start + j, start + j < columns, 0.0).to(tl.float32)
        tl.store(out + row * columns + start + j, _rounded(value, step, 127), start + j < columns)


@triton.jit
def _int4(weight, out, scale, groups, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK groups a program; HALF is the power of two that holds half a group."""
    group = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = tl.arange(0, HALF)
    inside = (group < groups)[:, None] & (j < GROUP // 2)[None, :]
    place = weight + group[:, None] * GROUP + j[None, :]
    lower = tl.load(place, inside, 0.0).to(tl.float32)
    upper = tl.load(place + GROUP // 2, inside, 0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), 1)
    odd = tl.sum((lower - lower) + (upper - upper), 1)
    step = tl.div_rn(largest + odd, 7.0)
    tl.store(scale + group, step, group < groups)
    low = _rounded(lower, step[:, None], 7) + 8
    high = _rounded(upper, step[:, None], 7) + 8
    packed = low.to(tl.uint8) | (high.to(tl.uint8) << 4)
    tl.store(out + group[:, None] * (GROUP // 2) + j[None, :], packed, inside)


def configuration(group: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options) for int4 groups; int8 rows take blocks of 2048 columns and 8 warps."""
    half = triton.next_power_of_2(group // 2)
    return {"GROUP": group, "HALF": half, "BLOCK": max(1, 2048 // half)}, {"num_warps": 4}


def quantize_int8(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), contiguous; see ``kernels.quantize_int8``."""
    rows, columns = weight.shape
    out = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(rows, dtype=torch.float32)
    if rows:
        _int8[(rows,)](weight, out, scale, columns, BLOCK=2048, num_warps=8)
    return out, scale


def quantize_int4(weight: Any, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), contiguous, in a multiple of group_size; see ``kernels.quantize_int4``."""
    rows, columns = weight.shape
    out = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
    scale = weight.new_empty((rows, columns // group_size), dtype=torch.float32)
    if scale.numel():
        constants, options = configuration(group_size)
        grid = (triton.cdiv(scale.numel(), constants["BLOCK"]),)
        _int4[grid](weight, out, scale, scale.numel(), **constants, **options)
    return out, scale


def compilations() -> list[Any]:
    """The shipped configurations, for ``kernels.ahead_of_time``."""
    from kernels.ahead_of_time import Compilation

    found = []
    for short in ("bf16", "fp32"):
        types = {"weight": f"*{short}!", "out": "*i8!", "scale": "*fp32!", "columns": "i32!"}
        found.append(
            Compilation(
                f"{short} rows",
                _int8,
                types,
                {"BLOCK": 2048},
                {"num_warps": 8},
                "quantize_int8",
                "forward",
                False,
            )
        )
        constants, options = configuration(128)
        types = {"weight": f"*{short}!", "out": "*u8!", "scale": "*fp32!", "groups": "i32!"}
        found.append(
            Compilation(
                f"{short} groups of 128", _int4, types, constants, options, "quantize_int4", "forward", False
            )
        )
    return found
