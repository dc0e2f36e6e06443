"""Rows of weights to integers in Triton: the largest magnitude, then one rounding of each weight."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.warps import LANES, targets_by_lanes, warps_of

_BLOCK = 2048  # columns of an int8 row at a time
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


def configuration(group: int = 0, lanes: int = LANES) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options) for int4 groups, or without a group for int8 rows; lanes: threads a warp."""
    if not group:
        return {"BLOCK": _BLOCK}, {"num_warps": warps_of(256, lanes)}
    half = triton.next_power_of_2(group // 2)
    options = {"num_warps": warps_of(128, lanes)}
    return {"GROUP": group, "HALF": half, "BLOCK": max(1, 2048 // half)}, options


def quantize_int8(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), contiguous; see ``kernels.quantize_int8``."""
    rows, columns = weight.shape
    out = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(rows, dtype=torch.float32)
    if rows:
        constants, options = configuration()
        _int8[(rows,)](weight, out, scale, columns, **constants, **options)
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
    for short, (lanes, targets) in itertools.product(("bf16", "fp32"), targets_by_lanes().items()):
        for bits, kernel, last, what, group in (
            (8, _int8, "columns", "rows", 0),
            (4, _int4, "groups", "groups of 128", 128),
        ):
            constants, options = configuration(group, lanes)
            out = "*i8!" if bits == 8 else "*u8!"
            types = {"weight": f"*{short}!", "out": out, "scale": "*fp32!", last: "i32!"}
            label, operation = f"{short} {what}, {lanes} lanes", f"quantize_int{bits}"
            found.append(
                Compilation(label, kernel, types, constants, options, operation, "forward", targets=targets)
            )
    return found
