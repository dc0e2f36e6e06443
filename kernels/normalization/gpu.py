"""Layer and root-mean-square normalisation in Triton, forward: each row crosses memory once.

Up to ``HELD`` columns a program holds whole rows in registers (several where they are short), so that the
variance is that of centred values. Longer rows are read in blocks, whose means and sums of squares are merged
(Chan, Golub and LeVeque 1983, equations 1.5a and 1.5b); the second reading comes from the second-level cache.
Statistics are float32. Row offsets are 64-bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.warps import LANES, targets_by_lanes, warps_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

HELD = 16384  # columns of a row that is held in registers
TILE = 4096  # elements a program holds where rows are short
SPLIT = 4096  # columns a block of a longer row


@triton.jit
def _load_sum(x, residual, total, offsets, inside, ADDED: tl.constexpr):
    """x, or x + residual rounded to its dtype and kept in total; as float32."""
    value = tl.load(x + offsets, mask=inside, other=0.0)
    if ADDED:
        other = tl.load(residual + offsets, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + offsets, value, mask=inside)
    return value.to(tl.float32)


@triton.jit
def _scaled(value, weight, bias, columns, inside, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """value * weight + bias; the parameters are row vectors, or absent."""
    if WEIGHT:
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def held_rows(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean,
    rstd,
    rows,
    columns,
    eps,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, each in one block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists, inside_row = row < rows, column < columns
    inside = exists[:, None] & inside_row[None, :]
    offsets = row[:, None] * columns + column[None, :]
    value = _load_sum(x, residual, total, offsets, inside, ADDED)
    if CENTRED:
        middle = tl.sum(value, 1) / columns
        value = tl.where(inside_row[None, :], value - middle[:, None], 0.0)
        rest = tl.sum(value, 1) / columns  # what rounding left in the mean
        value = tl.where(inside_row[None, :], value - rest[:, None], 0.0)
        tl.store(mean + row, middle + rest, mask=exists)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(rstd + row, scale, mask=exists)
    value = _scaled(value * scale[:, None], weight, bias, column, inside_row, WEIGHT, BIAS)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def split_rows(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean,
    rstd,
    columns,
    eps,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row in blocks."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    column = tl.arange(0, BLOCK)
    middle, square, seen = 0.0, 0.0, 0.0
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        value = _load_sum(x, residual, total, start + first + column, inside, ADDED)
        if CENTRED:
            count = tl.minimum(columns - first, BLOCK).to(tl.float32)
            block_mean = tl.sum(value, 0) / count
            value = tl.where(inside, value - block_mean, 0.0)
            distance = block_mean - middle
            square += distance * distance * seen * count / (seen + count)
            middle += distance * count / (seen + count)
            seen += count
        square += tl.sum(value * value, 0)
    scale = 1.0 / tl.sqrt(square / columns + eps)
    if CENTRED:
        tl.store(mean + row, middle)
    tl.store(rstd + row, scale)
    if ADDED:
        tl.debug_barrier()  # the sum is read again, by other threads than those that stored it
        x = total
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        value = tl.load(x + start + first + column, mask=inside, other=0.0).to(tl.float32)
        value = ((value - middle) * scale)[None, :]
        value = _scaled(value, weight, bias, first + column, inside, WEIGHT, BIAS)
        place = out + start + (first + column)[None, :]
        tl.store(place, value.to(out.dtype.element_ty), mask=inside[None, :])


def configuration(columns: int, lanes: int = LANES) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes, options) for rows of this length: from registers and spills seen ahead of time.

    ROWS is there where rows are held. 16 to 32 float32 values a thread leave room for several programs a
    multiprocessor. lanes: threads a warp.
    """
    if columns > HELD:
        return {"BLOCK": SPLIT}, {"num_warps": warps_of(256, lanes)}
    block = max(16, triton.next_power_of_2(columns))
    rows = max(1, min(32, TILE // block))
    threads = {8192: 256, 16384: 1024}.get(block, 128)
    return {"ROWS": rows, "BLOCK": block}, {"num_warps": warps_of(threads, lanes)}


def forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``cpu.forward``."""
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty_like(input)
    total = out if residual is None else torch.empty_like(input)
    rows = input.numel() // columns
    rstd = input.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd
    constants, options = configuration(columns)
    flags = {
        "CENTRED": centred,
        "ADDED": residual is not None,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
    }
    tensors = (input, residual, weight, bias, out, total, mean, rstd)
    if "ROWS" in constants:
        grid = (triton.cdiv(rows, constants["ROWS"]),)
        held_rows[grid](*tensors, rows, columns, eps, **flags, **constants, **options)
    else:
        split_rows[(rows,)](*tensors, columns, eps, **flags, **constants, **options)
    return out, total, mean, rstd


def compilations() -> list[Compilation]:
    """The shipped configurations for widths from 64 to 32768, in bfloat16 (and one in float32)."""
    from kernels.ahead_of_time import Compilation

    found = []
    for operation, columns, dtype in (
        ("layer_norm", 64, "bf16"),
        ("layer_norm", 1024, "bf16"),
        ("layer_norm", 4096, "fp32"),
        ("layer_norm", 16384, "bf16"),
        ("layer_norm", 32768, "bf16"),
        ("rms_norm", 8192, "bf16"),
        ("add_layer_norm", 4096, "bf16"),
        ("add_rms_norm", 16384, "bf16"),
        ("add_rms_norm", 32768, "bf16"),
    ):
        found += [
            _compilation(Compilation, operation, columns, dtype, lanes, targets)
            for lanes, targets in targets_by_lanes().items()
        ]
    return found


def _compilation(
    make: Any, operation: str, columns: int, dtype: str, lanes: int, targets: tuple[str, ...]
) -> Any:
    added, centred = operation.startswith("add_"), operation.endswith("layer_norm")
    block_sizes, options = configuration(columns, lanes)
    constants: dict[str, Any] = {
        "CENTRED": centred, "ADDED": added, "WEIGHT": True, "BIAS": centred, **block_sizes
    }  # fmt: skip
    types = {name: f"*{dtype}!" for name in ("x", "weight", "out", "total")}
    types |= {"mean": "*fp32!", "rstd": "*fp32!", "columns": "i32!", "eps": "fp32"}
    for name, present in (("residual", added), ("bias", centred)):
        if present:
            types[name] = f"*{dtype}!"
        else:
            constants[name] = None
    if "ROWS" in block_sizes:
        types["rows"] = "i32!"
    kernel = held_rows if "ROWS" in block_sizes else split_rows
    label = f"{operation} forward {dtype} {columns}, {lanes} lanes"
    return make(label, kernel, types, constants, options, operation, "forward", targets=targets)
