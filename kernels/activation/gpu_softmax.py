"""Softmax on the GPU: a row in the registers of one program; longer rows in blocks, with the online form.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.
"""

# Triton declares constants by annotation, and types nothing else.
# mypy: allow-incomplete-defs

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.warps import LANES, targets_by_lanes, warps_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

LONGEST = 16384
"""Elements of a row that one program keeps: 32 in each thread of 16 warps."""


@triton.jit
def _forward(x, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    offsets = row * columns + column
    number = tl.load(x + offsets, mask=inside, other=-float("inf")).to(tl.float32)
    shifted = tl.where(inside, number - tl.max(number, 1)[:, None], -float("inf"))
    exponential = tl.exp(shifted)
    result = exponential / tl.sum(exponential, 1)[:, None]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _forward_long(x, out, columns, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        number = tl.load(x + start + first + column, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, number)
        # In a lane that has seen nothing but -inf, inf - inf would be NaN; a NaN that was read stays.
        seen = higher != -float("inf")
        total = tl.where(seen, total * tl.exp(top - higher) + tl.exp(number - higher), total)
        total = tl.where(number != number, number, total)
        top = higher
    highest = tl.max(top, 0)
    scale = 1.0 / tl.sum(total * tl.exp(top - highest), 0)
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        number = tl.load(x + start + first + column, mask=inside).to(tl.float32)
        result = tl.exp(number - highest) * scale
        tl.store(out + start + first + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, out, grad_input, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    offsets = row * columns + column
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out + offsets, mask=inside, other=0.0).to(tl.float32)
    result = (g - tl.sum(g * y, 1)[:, None]) * y
    tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


@triton.jit
def _backward_long(grad, out, grad_input, columns, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    products = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        g = tl.load(grad + start + first + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(out + start + first + column, mask=inside, other=0.0).to(tl.float32)
        products += g * y
    dot = tl.sum(products, 0)
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        g = tl.load(grad + start + first + column, mask=inside).to(tl.float32)
        y = tl.load(out + start + first + column, mask=inside).to(tl.float32)
        tl.store(
            grad_input + start + first + column, ((g - dot) * y).to(grad_input.dtype.element_ty), mask=inside
        )


def configuration(columns: int, lanes: int = LANES) -> tuple[dict[str, int], dict[str, int]]:
    """A row, or 2048 elements of short ones, to a program; 16 to 32 elements to a thread.

    Of a longer row 8: the two running numbers of each element make 16 spill on sm_100. lanes: threads a
    warp.
    """
    if columns > LONGEST:
        return {"BLOCK": 4096}, {"num_warps": warps_of(512, lanes)}
    block = triton.next_power_of_2(max(columns, 1))
    rows = max(1, min(64, 2048 // block))
    threads = min(512, max(128, block // 16))
    return {"ROWS": rows, "BLOCK": block}, {"num_warps": warps_of(threads, lanes)}


def softmax(input: torch.Tensor) -> torch.Tensor:
    """Softmax along the last dimension of a contiguous tensor."""
    out = torch.empty_like(input)
    if out.numel():
        columns = input.shape[-1]
        rows = input.numel() // columns
        constants, options = configuration(columns)
        if columns > LONGEST:
            _forward_long[(rows,)](input, out, columns, **constants, **options)
        else:
            grid = (triton.cdiv(rows, constants["ROWS"]),)
            _forward[grid](input, out, rows, columns, **constants, **options)
    return out


def softmax_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(grad - sum(grad * output)) * output along the last dimension; both contiguous."""
    grad_input = torch.empty_like(output)
    if output.numel():
        columns = output.shape[-1]
        rows = output.numel() // columns
        constants, options = configuration(columns)
        if columns > LONGEST:
            _backward_long[(rows,)](grad, output, grad_input, columns, **constants, **options)
        else:
            grid = (triton.cdiv(rows, constants["ROWS"]),)
            _backward[grid](grad, output, grad_input, rows, columns, **constants, **options)
    return grad_input


def compilations() -> list[Compilation]:
    """Short, usual and long rows, in bfloat16."""
    from kernels.ahead_of_time import Compilation

    found = []
    sizes_and_lanes = itertools.product((128, 1024, 4096, LONGEST, 131072), targets_by_lanes().items())
    for columns, (lanes, targets) in sizes_and_lanes:
        constants, options = configuration(columns, lanes)
        long = columns > LONGEST
        sizes = {"columns": "i32!"} if long else {"rows": "i32!", "columns": "i32!"}
        for direction, kernel, tensors in (
            ("forward", _forward_long if long else _forward, ("x", "out")),
            ("backward", _backward_long if long else _backward, ("grad", "out", "grad_input")),
        ):
            types = dict.fromkeys(tensors, "*bf16!") | sizes
            label = f"softmax {direction} {columns} bf16, {lanes} lanes"
            found.append(
                Compilation(label, kernel, types, constants, options, "softmax", direction, targets=targets)
            )
    return found
