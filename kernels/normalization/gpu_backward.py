"""Layer and root-mean-square normalisation in Triton, backward; the formulas stand in ``cpu_backward``.

A fixed number of programs, each with a stripe of rows, keep their sums of the weight's and bias's gradients
and write them as partial rows; a second kernel adds these in order. There are no atomics: the result is the
same every time on a device.

Up to ``HELD`` columns a program holds its rows and both sums in registers. Longer rows would spill: a program
then takes ``GROUP`` rows at a time in blocks of columns, twice, and adds to its partial rows, which stay in
the second-level cache, once for each group.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.warps import LANES, targets_by_lanes, warps_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

HELD = 4096
TILE = 2048  # elements a program holds where rows are short
GROUP, SPLIT = 4, 1024
MULTIPROCESSORS = 132  # of an H200, where there is no device to ask


@triton.jit
def _load(pointer, offsets, inside):
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _grad_input(grad, value, weight, extra, middle, scale, grad_mean, projection, offsets, inside,
                ADDED: tl.constexpr):  # fmt: skip
    result = scale[:, None] * (grad * weight - grad_mean[:, None] - value * projection[:, None])
    if ADDED:
        result += _load(extra, offsets, inside)
    return result


@triton.jit
def held_backward(
    grad,
    extra,
    x,
    mean,
    rstd,
    weight,
    grad_input,
    weights,
    biases,
    rows,
    columns,
    stripe,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHT: tl.constexpr,
    INPUT: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stripe of ``stripe`` rows, ROWS at a time; each row in one block."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside_row = column < columns
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    w = tl.full((1, BLOCK), 1.0, tl.float32)
    if WEIGHT:
        w = _load(weight, column, inside_row)[None, :]
    for first in range(0, stripe, ROWS):
        row = program * stripe + first + tl.arange(0, ROWS)
        exists = (row < rows) & (first + tl.arange(0, ROWS) < stripe)
        inside = exists[:, None] & inside_row[None, :]
        offsets = row[:, None] * columns + column[None, :]
        g = _load(grad, offsets, inside)
        value = _load(x, offsets, inside)
        scale = tl.load(rstd + row, mask=exists, other=0.0)
        if CENTRED:
            value -= tl.load(mean + row, mask=exists, other=0.0)[:, None]
        if PARAMETERS:
            weight_sum += g * (value * scale[:, None])
            if BIASED:
                bias_sum += g
        if INPUT:
            projection = tl.sum(g * w * value, 1) * scale * scale / columns
            grad_mean = tl.zeros((ROWS,), tl.float32)
            if CENTRED:
                grad_mean = tl.sum(g * w, 1) / columns
            result = _grad_input(
                g, value, w, extra, 0.0, scale, grad_mean, projection, offsets, inside, ADDED
            )
            tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)
    if PARAMETERS:
        place = program * columns + column
        tl.store(weights + place, tl.sum(weight_sum, 0), mask=inside_row)
        if BIASED:
            tl.store(biases + place, tl.sum(bias_sum, 0), mask=inside_row)


@triton.jit
def split_backward(
    grad,
    extra,
    x,
    mean,
    rstd,
    weight,
    grad_input,
    weights,
    biases,
    rows,
    columns,
    stripe,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHT: tl.constexpr,
    INPUT: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stripe of ``stripe`` rows, ROWS at a time, in blocks of columns."""
    program = tl.program_id(0).to(tl.int64)
    for first in range(0, stripe, ROWS):
        row = program * stripe + first + tl.arange(0, ROWS)
        exists = (row < rows) & (first + tl.arange(0, ROWS) < stripe)
        scale = tl.load(rstd + row, mask=exists, other=0.0)
        middle = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            middle = tl.load(mean + row, mask=exists, other=0.0)
        grad_mean = tl.zeros((ROWS,), tl.float32)
        projection = tl.zeros((ROWS,), tl.float32)
        if INPUT:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = exists[:, None] & (column < columns)[None, :]
                offsets = row[:, None] * columns + column[None, :]
                g = _load(grad, offsets, inside)
                if WEIGHT:
                    g *= _load(weight, column, column < columns)[None, :]
                projection += tl.sum(g * (_load(x, offsets, inside) - middle[:, None]), 1)
                if CENTRED:
                    grad_mean += tl.sum(g, 1)
            projection *= scale * scale / columns
            grad_mean /= columns
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside_row = column < columns
            inside = exists[:, None] & inside_row[None, :]
            offsets = row[:, None] * columns + column[None, :]
            g = _load(grad, offsets, inside)
            value = _load(x, offsets, inside) - middle[:, None]
            if PARAMETERS:
                place = program * columns + column
                earlier = inside_row & (first > 0)
                weight_sum = tl.sum(g * (value * scale[:, None]), 0)
                weight_sum += tl.load(weights + place, mask=earlier, other=0.0)
                tl.store(weights + place, weight_sum, mask=inside_row)
                if BIASED:
                    bias_sum = tl.sum(g, 0) + tl.load(biases + place, mask=earlier, other=0.0)
                    tl.store(biases + place, bias_sum, mask=inside_row)
            if INPUT:
                w = tl.full((1, BLOCK), 1.0, tl.float32)
                if WEIGHT:
                    w = _load(weight, column, inside_row)[None, :]
                result = _grad_input(
                    g, value, w, extra, middle, scale, grad_mean, projection, offsets, inside, ADDED
                )
                tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


@triton.jit
def sum_partial_rows(partial, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of partial's rows, ROWS at a time from the first on; a block of columns."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial + offsets, mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0), mask=column < columns)


def configuration(columns: int, lanes: int = LANES) -> tuple[dict[str, int], dict[str, int], int]:
    """(block sizes, options, programs a multiprocessor) for rows of this length.

    From registers and spills seen ahead of time: a held row takes five float32 values a column. Short rows
    come several to a program, 16 rows of 64 columns to 128 threads: eight numbers a thread still, a load of
    16 bytes. lanes: threads a warp.
    """
    if columns > HELD:
        return {"ROWS": GROUP, "BLOCK": SPLIT}, {"num_warps": warps_of(256, lanes)}, 2
    block = max(16, triton.next_power_of_2(columns))
    rows = max(1, min(16, TILE // block))
    threads, resident = (256, 2) if block > 2048 else (128, 4)
    return {"ROWS": rows, "BLOCK": block}, {"num_warps": warps_of(threads, lanes)}, resident


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _stripes(rows: int, least: int, programs: int) -> tuple[int, int]:
    """(programs, rows of each): a whole number of ``least`` rows, and no program without rows."""
    stripe = triton.cdiv(triton.cdiv(rows, programs), least) * least
    return triton.cdiv(rows, stripe), stripe


def _summed(partial: torch.Tensor) -> torch.Tensor:
    rows, columns = partial.shape
    out = partial.new_empty(columns)
    sum_partial_rows[(triton.cdiv(columns, 64),)](partial, out, rows, columns, ROWS=32, BLOCK=64, num_warps=4)
    return out


def backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    input: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    columns: int,
    inputs: bool,
    weighted: bool,
    biased: bool,
) -> tuple[torch.Tensor | None, ...]:
    """As ``cpu_backward.backward``."""
    grad_input = torch.empty_like(input) if inputs else None
    rows = rstd.numel()
    constants, options, resident = configuration(columns)
    programs, stripe = _stripes(rows, constants["ROWS"], resident * _multiprocessors(input.device))
    weights = rstd.new_empty(programs, columns) if weighted else None
    biases = rstd.new_empty(programs, columns) if biased else None
    kernel = split_backward if columns > HELD else held_backward
    kernel[(programs,)](
        grad,
        grad_sum,
        input,
        mean,
        rstd,
        weight if weight is None else weight.contiguous(),
        grad_input,
        weights,
        biases,
        rows,
        columns,
        stripe,
        CENTRED=mean is not None,
        ADDED=grad_sum is not None,
        WEIGHT=weight is not None,
        INPUT=inputs,
        PARAMETERS=weighted,
        BIASED=biased,
        **constants,
        **options,
    )
    return grad_input, *(rstd.new_empty(0) if sums is None else _summed(sums) for sums in (weights, biases))


def compilations() -> list[Compilation]:
    """The shipped configurations for widths from 64 to 16384, in bfloat16 (and one in float32)."""
    from kernels.ahead_of_time import Compilation

    found = [
        _compilation(Compilation, *which, lanes, targets)
        for lanes, targets in targets_by_lanes().items()
        for which in (
            ("layer_norm", 64, "bf16", True, True),
            ("layer_norm", 1024, "bf16", True, True),
            ("layer_norm", 2048, "bf16", True, True),
            ("layer_norm", 4096, "fp32", True, True),
            ("layer_norm", 4096, "bf16", True, True),
            ("layer_norm", 4096, "bf16", True, False),
            ("layer_norm", 4096, "bf16", False, True),
            ("layer_norm", 16384, "bf16", True, True),
            ("rms_norm", 4096, "bf16", True, True),
            ("add_layer_norm", 4096, "bf16", True, True),
            ("add_rms_norm", 8192, "bf16", True, True),
        )
    ]
    types = {"partial": "*fp32!", "out": "*fp32!", "rows": "i32", "columns": "i32!"}
    sizes = {"ROWS": 32, "BLOCK": 64}
    label = "sum of partial rows"
    found.append(
        Compilation(label, sum_partial_rows, types, sizes, {"num_warps": 4}, "layer_norm", "backward")
    )
    return found


def _compilation(
    make: Any,
    operation: str,
    columns: int,
    dtype: str,
    inputs: bool,
    parameters: bool,
    lanes: int,
    targets: tuple[str, ...],
) -> Any:
    added, centred = operation.startswith("add_"), operation.endswith("layer_norm")
    block_sizes, options, _ = configuration(columns, lanes)
    constants: dict[str, Any] = {
        "CENTRED": centred,
        "ADDED": added,
        "WEIGHT": inputs,
        "INPUT": inputs,
        "PARAMETERS": parameters,
        "BIASED": centred and parameters,
        **block_sizes,
    }
    types = {"grad": f"*{dtype}!", "x": f"*{dtype}!", "rstd": "*fp32!"}
    types |= {"rows": "i32", "columns": "i32!", "stripe": "i32"}
    for name, kind, present in (
        ("extra", dtype, added),
        ("mean", "fp32", centred),
        ("weight", dtype, inputs),
        ("grad_input", dtype, inputs),
        ("weights", "fp32", parameters),
        ("biases", "fp32", centred and parameters),
    ):
        if present:
            types[name] = f"*{kind}!"
        else:
            constants[name] = None
    kernel = split_backward if columns > HELD else held_backward
    part = {(True, True): "", (True, False): " input", (False, True): " weight"}[inputs, parameters]
    label = f"{operation} backward{part} {dtype} {columns}, {lanes} lanes"
    return make(label, kernel, types, constants, options, operation, "backward", targets=targets)
