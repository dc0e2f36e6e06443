"""Rotary position embedding on the GPU: x is read once and written once, the tables come from the caches."""

# Triton declares constants by annotation, and types nothing else.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.rotary.layout import empty_result, four_dimensions, loops_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation


@triton.jit
def _rotate(
    x,
    out,
    cos,
    sin,
    sign,
    rows,
    size_1,
    size_2,
    x_0,
    x_1,
    x_2,
    out_0,
    out_1,
    out_2,
    angle_0,
    angle_1,
    angle_2,
    pairs,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, j, k = row // (size_1 * size_2), row // size_2 % size_1, row % size_2
    source = (i * x_0 + j * x_1 + k * x_2)[:, None]
    target = (i * out_0 + j * out_1 + k * out_2)[:, None]
    angle = (i * angle_0 + j * angle_1 + k * angle_2)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (row < rows)[:, None] & (pair < pairs)
    c = tl.load(cos + angle + pair, mask=inside).to(tl.float32)
    s = tl.load(sin + angle + pair, mask=inside).to(tl.float32) * sign
    element = out.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        within = (row < rows)[:, None] & (both < 2 * pairs)
        neighbours = tl.load(x + source + both, mask=within).to(tl.float32)
        a, b = tl.split(tl.reshape(neighbours, (ROWS, PAIRS, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * PAIRS))
        tl.store(out + target + both, turned.to(element), mask=within)
    else:
        a = tl.load(x + source + pair, mask=inside).to(tl.float32)
        b = tl.load(x + source + pairs + pair, mask=inside).to(tl.float32)
        tl.store(out + target + pair, (a * c - b * s).to(element), mask=inside)
        tl.store(out + target + pairs + pair, (b * c + a * s).to(element), mask=inside)


def configuration(pairs: int) -> tuple[dict[str, int], dict[str, int]]:
    """2048 pairs to a program of four warps: 16 to a thread."""
    block = triton.next_power_of_2(pairs)
    return {"ROWS": max(1, 2048 // block), "PAIRS": block}, {"num_warps": 4}


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """x (..., length, dim) turned by the angles of cos and sin (length, dim / 2), or back by ``inverse``."""
    out = empty_result(x)
    if not out.numel():
        return out
    source, target = four_dimensions(x), four_dimensions(out)
    sizes, *strides = zip(*loops_of(source.shape, source.stride(), target.stride()), strict=True)
    rows = sizes[0] * sizes[1] * sizes[2]
    constants, options = configuration(cos.shape[1])
    _rotate[(triton.cdiv(rows, constants["ROWS"]),)](
        source,
        target,
        cos.contiguous(),
        sin.contiguous(),
        -1.0 if inverse else 1.0,
        rows,
        *sizes[1:],
        *(stride for group in strides for stride in group),
        cos.shape[1],
        INTERLEAVED=interleaved,
        **constants,
        **options,
    )
    return out


def compilations() -> list[Compilation]:
    """Heads of 64 and 128 in bfloat16, both pairings; the backward pass is the same kernel."""
    from kernels.ahead_of_time import Compilation

    names = [f"{name}_{axis}" for name in ("x", "out", "angle") for axis in range(3)]
    types = {"x": "*bf16!", "out": "*bf16!", "cos": "*fp32!", "sin": "*fp32!", "sign": "fp32", "rows": "i32!"}
    types |= {"size_1": "i32!", "size_2": "i32!"} | dict.fromkeys(names, "i32!") | {"pairs": "i32!"}
    return [
        Compilation(
            f"rotary_embedding {dim} {'interleaved ' * interleaved}{direction} bf16",
            _rotate,
            types,
            {"INTERLEAVED": interleaved, **configuration(dim // 2)[0]},
            configuration(dim // 2)[1],
            "rotary_embedding",
            direction,
        )
        for dim in (64, 128)
        for interleaved in (False, True)
        for direction in ("forward", "backward")
    ]
