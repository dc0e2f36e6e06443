"""Two Triton kernels as a family would ship them, for the tests of the ground they stand on."""

import triton
import triton.language as tl

from kernels.ahead_of_time import Compilation


@triton.jit
def layer_norm(x, weight, bias, y, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / columns
    centred = tl.where(inside, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    w = tl.load(weight + offsets, mask=inside).to(tl.float32)
    b = tl.load(bias + offsets, mask=inside).to(tl.float32)
    tl.store(y + row + offsets, (centred * scale * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def matmul(a, b, c, m, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            a + rows[:, None] * k + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0
        )
        right = tl.load(
            b + depth[:, None] * n + columns[None, :],
            mask=(depth[:, None] < k) & (columns[None, :] < n),
            other=0.0,
        )
        total = tl.dot(left, right, total)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def matmul_with_roles(a, b, c, m, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The loads in warps of their own."""
    left = tl.make_tensor_descriptor(a, [m, k], [k, 1], [ROWS, DEPTH])
    right = tl.make_tensor_descriptor(b, [k, n], [n, 1], [DEPTH, COLUMNS])
    out = tl.make_tensor_descriptor(c, [m, n], [n, 1], [ROWS, COLUMNS])
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, k, DEPTH, warp_specialize=True):
        total = tl.dot(left.load([row, start]), right.load([start, column]), total)
    out.store([row, column], total.to(c.dtype.element_ty))


def norm(columns: int, warps: int, **changes) -> Compilation:
    values = {
        "label": f"layer_norm {columns}",
        "kernel": layer_norm,
        "types": {name: "*bf16!" for name in ("x", "weight", "bias", "y")}
        | {"columns": "i32!", "eps": "fp32"},
        "constants": {"BLOCK": columns},
        "options": {"num_warps": warps},
        "operation": "sample",
        "direction": "forward",
    }
    return Compilation(**(values | changes))


def product(rows: int, columns: int, depth: int, warps: int, **changes) -> Compilation:
    values = {
        "label": f"matmul {rows}x{columns}x{depth}",
        "kernel": matmul,
        "types": {name: "*bf16!" for name in "abc"} | {name: "i32!" for name in "mnk"},
        "constants": {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth},
        "options": {"num_warps": warps, "num_stages": 3},
        "operation": "sample",
        "direction": "forward",
        "matrix": True,
    }
    return Compilation(**(values | changes))
