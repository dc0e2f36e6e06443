"""``linear`` with quantised weights in Triton: weights are widened in registers, then multiplied by
``tl.dot``.

Integers are exact in every dtype of the activations, so the forward product is that of the quantised values;
scales multiply float32 sums, of the whole row (int8) or of each group (int4). Backward, where a scale belongs
to the dimension that is summed, the weight is rounded to the dtype of the gradient once, as a dequantised one
would be.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.warps import LANES, targets_by_lanes, warps_of


@triton.jit
def _int8_forward(
    x, weight, scale, bias, out, rows, out_features, in_features,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x + m.to(tl.int64)[:, None] * in_features
    weight_rows = weight + n.to(tl.int64)[:, None] * in_features
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inside = start + k < in_features
        left = tl.load(x_rows + (start + k)[None, :], (m < rows)[:, None] & inside[None, :], 0.0)
        right = tl.load(weight_rows + (start + k)[None, :], (n < out_features)[:, None] & inside[None, :], 0)
        total = tl.dot(left, tl.trans(right.to(left.dtype)), total, input_precision="ieee")
    total *= tl.load(scale + n, n < out_features, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, n < out_features, 0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < out_features)[None, :])


@triton.jit
def _int4_forward(
    x, weight, scale, bias, out, rows, out_features, groups,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K bytes at a time: columns k of a group from the lower nibbles, k + GROUP / 2 from the upper."""
    HALF: tl.constexpr = GROUP // 2
    blocks_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x + m.to(tl.int64)[:, None] * (groups * GROUP)
    weight_rows = weight + n.to(tl.int64)[:, None] * (groups * HALF)
    scale_rows = scale + n.to(tl.int64) * groups
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.static_range(0, HALF, BLOCK_K):
            place = x_rows + (group * GROUP + start + k)[None, :]
            lower = tl.load(place, (m < rows)[:, None], 0.0)
            upper = tl.load(place + HALF, (m < rows)[:, None], 0.0)
            packed = tl.load(
                weight_rows + (group * HALF + start + k)[None, :], (n < out_features)[:, None], 0
            )
            low = ((packed & 15).to(tl.int8) - 8).to(lower.dtype)
            high = ((packed >> 4).to(tl.int8) - 8).to(lower.dtype)
            part = tl.dot(lower, tl.trans(low), part, input_precision="ieee")
            part = tl.dot(upper, tl.trans(high), part, input_precision="ieee")
        total += part * tl.load(scale_rows + group, n < out_features, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, n < out_features, 0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < out_features)[None, :])


@triton.jit
def _int8_backward(
    grad, weight, scale, out, rows, out_features, in_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, k] = sum over n of grad[m, n] * scale[n] * weight[n, k]."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) // blocks_m) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad_rows = grad + m.to(tl.int64)[:, None] * out_features
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, out_features, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = tl.load(grad_rows + n[None, :], (m < rows)[:, None] & (n < out_features)[None, :], 0.0)
        place = weight + n.to(tl.int64)[:, None] * in_features + k[None, :]
        right = tl.load(place, (n < out_features)[:, None] & (k < in_features)[None, :], 0).to(tl.float32)
        right *= tl.load(scale + n, n < out_features, 0.0)[:, None]
        total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
    place = out + m.to(tl.int64)[:, None] * in_features + k[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (m < rows)[:, None] & (k < in_features)[None, :])


@triton.jit
def _int4_backward(
    grad, weight, scale, out, rows, out_features, groups,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for BLOCK_K bytes of one group: two blocks of columns, GROUP / 2 apart."""
    HALF: tl.constexpr = GROUP // 2
    blocks_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) // blocks_m
    group = block // (HALF // BLOCK_K)
    within = block % (HALF // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad_rows = grad + m.to(tl.int64)[:, None] * out_features
    lower = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    upper = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, out_features, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = tl.load(grad_rows + n[None, :], (m < rows)[:, None] & (n < out_features)[None, :], 0.0)
        place = weight + n.to(tl.int64)[:, None] * (groups * HALF) + (group * HALF + within)[None, :]
        packed = tl.load(place, (n < out_features)[:, None], 0)
        factor = tl.load(scale + n.to(tl.int64) * groups + group, n < out_features, 0.0)[:, None]
        low = ((packed & 15).to(tl.int8) - 8).to(tl.float32) * factor
        high = ((packed >> 4).to(tl.int8) - 8).to(tl.float32) * factor
        lower = tl.dot(left, low.to(left.dtype), lower, input_precision="ieee")
        upper = tl.dot(left, high.to(left.dtype), upper, input_precision="ieee")
    place = out + m.to(tl.int64)[:, None] * (groups * GROUP) + (group * GROUP + within)[None, :]
    tl.store(place, lower.to(out.dtype.element_ty), (m < rows)[:, None])
    tl.store(place + HALF, upper.to(out.dtype.element_ty), (m < rows)[:, None])


# --- launching -----------------------------------------------------------------------------------


def configuration(
    rows: int, dtype: torch.dtype, bits: int, group: int = 0, backward: bool = False, lanes: int = LANES
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options): small blocks of rows for decoding, which streams weights; square ones for many
    rows.

    float32 goes without matrix units (ieee), so its blocks are small. int4: BLOCK_K counts bytes and divides
    half a group, and two sums are held forward, the group's and the row's, so that many rows take half the
    tile: a whole one spills on sm_80 and asks more shared memory than gfx942 has. lanes: threads a warp.
    """
    few_bytes = dtype is torch.float32  # a row of int4 bytes that is a float32 block wide would be long
    if dtype is torch.float32 and rows <= 16 and (backward or bits == 4):
        m, n, k, threads, stages = (16, 32, 128, 128, 4) if backward else (16, 32, 32, 128, 3)
        few_bytes = False  # below 64 bytes a row no load is 16 bytes wide
    elif dtype is torch.float32:
        m, n, k, threads, stages = (16, 32, 32, 128, 3) if rows <= 16 else (32, 32, 32, 128, 2)
    elif rows <= 16:
        m, n, k, threads, stages = (16, 64, 64, 128, 3) if backward else (16, 32, 128, 128, 4)
    elif rows <= 64:
        m, n, k, threads, stages = 64, 64, 64, 128, 3
    elif backward:
        m, n, k, threads, stages = 128, 64, 128, 256, 3
    else:
        m, n, k, threads, stages = 128 if bits == 8 else 64, 128, 64, 256, 3
    if bits == 4:
        half = group // 2
        k = min(k, 16 if few_bytes else 64, half & -half)
    options = {"num_warps": warps_of(threads, lanes), "num_stages": stages}
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": max(16, k)}, options


def _forward(bits: int, input: Any, weight: Any, scale: Any, bias: Any) -> torch.Tensor:
    rows, in_features, out_features = input.shape[:-1].numel(), input.shape[-1], weight.shape[0]
    out = input.new_empty((*input.shape[:-1], out_features))
    if out.numel() == 0:
        return out
    groups = 1 if bits == 8 else max(1, scale.shape[1])
    group = in_features // groups
    constants, options = configuration(rows, input.dtype, bits, group)
    grid = (triton.cdiv(rows, constants["BLOCK_M"]) * triton.cdiv(out_features, constants["BLOCK_N"]),)
    constants["HAS_BIAS"] = bias is not None
    tensors = (input, weight, scale, bias if bias is not None else scale, out)
    if bits == 8:
        _int8_forward[grid](*tensors, rows, out_features, in_features, **constants, **options)
    else:
        groups = groups if in_features else 0
        group = max(32, group)
        _int4_forward[grid](*tensors, rows, out_features, groups, GROUP=group, **constants, **options)
    return out


def _backward(bits: int, grad: Any, weight: Any, scale: Any) -> torch.Tensor:
    rows, out_features = grad.shape[:-1].numel(), grad.shape[-1]
    in_features = weight.shape[1] * (8 // bits)
    out = grad.new_empty((*grad.shape[:-1], in_features))
    if out.numel() == 0:
        return out
    groups = 1 if bits == 8 else scale.shape[1]
    constants, options = configuration(rows, grad.dtype, bits, in_features // groups, backward=True)
    blocks_m = triton.cdiv(rows, constants["BLOCK_M"])
    if bits == 8:
        grid = (blocks_m * triton.cdiv(in_features, constants["BLOCK_K"]),)
        sizes = (rows, out_features, in_features)
        _int8_backward[grid](grad, weight, scale, out, *sizes, **constants, **options)
    else:
        grid = (blocks_m * (in_features // 2 // constants["BLOCK_K"]),)
        sizes = (rows, out_features, groups)
        group = in_features // groups
        _int4_backward[grid](grad, weight, scale, out, *sizes, GROUP=group, **constants, **options)
    return out


def linear_int8(input: Any, weight: Any, scale: Any, bias: Any) -> torch.Tensor:
    """input (..., in), weight (out, in) int8, scale (out,), bias (out,) or None; contiguous."""
    return _forward(8, input, weight, scale, bias)


def linear_int4(input: Any, weight: Any, scale: Any, bias: Any) -> torch.Tensor:
    """input (..., in), weight (out, in / 2) uint8, scale (out, groups), bias (out,) or None; contiguous."""
    return _forward(4, input, weight, scale, bias)


def linear_int8_backward(grad: Any, weight: Any, scale: Any) -> torch.Tensor:
    """The gradient of the input: grad (..., out) @ dequantised weight."""
    return _backward(8, grad, weight, scale)


def linear_int4_backward(grad: Any, weight: Any, scale: Any) -> torch.Tensor:
    """The gradient of the input: grad (..., out) @ dequantised weight."""
    return _backward(4, grad, weight, scale)


def compilations() -> list[Any]:
    """The shipped configurations, decoding one row and many, for ``kernels.ahead_of_time``."""
    from kernels.ahead_of_time import Compilation

    kernels = {
        (8, "forward"): _int8_forward,
        (8, "backward"): _int8_backward,
        (4, "forward"): _int4_forward,
        (4, "backward"): _int4_backward,
    }
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    found = []
    for (dtype, short), rows, (bits, direction), (lanes, targets) in itertools.product(
        names.items(), (1, 512), kernels, targets_by_lanes().items()
    ):
        backward = direction == "backward"
        constants, options = configuration(rows, dtype, bits, 128, backward, lanes)
        if bits == 4:
            constants["GROUP"] = 128
        if not backward:
            constants["HAS_BIAS"] = True
        weight = "*i8!" if bits == 8 else "*u8!"
        types = {"grad" if backward else "x": f"*{short}!", "weight": weight, "scale": "*fp32!"}
        types |= {} if backward else {"bias": f"*{short}!"}
        last = "in_features" if bits == 8 else "groups"
        types |= {"out": f"*{short}!", "rows": "i32", "out_features": "i32!", last: "i32!"}
        found.append(
            Compilation(
                label=f"{short} {rows} rows, {lanes} lanes",
                kernel=kernels[bits, direction],
                types=types,
                constants=constants,
                options=options,
                operation=f"linear_int{bits}",
                direction=direction,
                matrix=dtype is not torch.float32,
                targets=targets,
            )
        )
    return found
