"""Cross entropy in Triton: one row of logits a program, loss and gradient in one launch.

A row that fits into registers is read once. A longer one is read twice: the first time from memory, for its
maximum and sum (Milakov and Gimelshein 2018, section 3), the second time, for the gradient, mostly from the
second-level cache. For that, few rows may be on their way at once: 128k logits of 16 bits are 256 KB, and a
multiprocessor of a Hopper GPU has less than 400 KB of the cache to itself, so its threads share one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.loss.passes import Passes
from kernels.warps import LANES, targets_by_lanes, warps_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

_WHOLE_ROW = 16384  # elements of a row that 1024 threads hold in registers
_SCALE_BLOCK = 4096


@triton.jit
def _rows(
    logits,
    target,
    losses,
    scale,
    gradient,
    columns,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
):
    """losses[row], and gradient[row] of scale * losses[row]; gradient may be logits itself.

    WHOLE: BLOCK holds the row. A target that is no class gives NaN and reads nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    lanes = tl.arange(0, BLOCK)
    logits += row * columns
    gradient += row * columns
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, columns, BLOCK):
                inside = first + lanes < columns
                tl.store(gradient + first + lanes, zero.to(gradient.dtype.element_ty), mask=inside)
    else:
        known = (label >= 0) & (label < columns)
        chosen = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
        x = tl.load(logits + lanes, mask=lanes < columns, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        top = tl.max(x, 0)
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing but -inf so far: not NaN yet
        numbers = tl.exp(x - base)
        if SMOOTHING:
            pivot = base
            shifted = tl.where(lanes < columns, x - pivot, 0.0)
        if not WHOLE:
            for first in range(BLOCK, columns, BLOCK):
                inside = first + lanes < columns
                x = tl.load(
                    logits + first + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last"
                ).to(tl.float32)
                new = tl.maximum(top, tl.max(x, 0))
                base = tl.where(new == float("-inf"), 0.0, new)
                numbers = numbers * tl.exp(top - base) + tl.exp(x - base)
                top = new
                if SMOOTHING:
                    shifted += tl.where(inside, x - pivot, 0.0)
        total = tl.sum(numbers, 0)
        loss = tl.log(total) - (1.0 - smoothing) * (chosen - top)
        if SMOOTHING:
            loss -= smoothing * (tl.sum(shifted, 0) / columns + (pivot - top))
        tl.store(losses + row, loss)
        if GRADIENT:
            weight = tl.load(scale + row) if SCALE_PER_ROW else tl.load(scale)
            weight = tl.where(known, weight, float("nan"))
            factor = weight / total
            floor = weight * smoothing / columns
            step = weight * (1.0 - smoothing)
            if WHOLE:
                x = numbers * factor - floor - tl.where(lanes == label, step, 0.0)
                tl.store(gradient + lanes, x.to(gradient.dtype.element_ty), mask=lanes < columns)
            else:
                # The end of the row was read last, and is the likeliest to be in the first-level cache too.
                for block in range(0, tl.cdiv(columns, BLOCK)):
                    first = (tl.cdiv(columns, BLOCK) - 1 - block) * BLOCK
                    at = first + lanes
                    x = tl.load(
                        logits + at, mask=at < columns, other=float("-inf"), eviction_policy="evict_first"
                    )
                    x = tl.exp(x.to(tl.float32) - base) * factor - floor
                    x -= tl.where(at == label, step, 0.0)
                    tl.store(gradient + at, x.to(gradient.dtype.element_ty), mask=at < columns)


@triton.jit
def _scale(kept, factor, elements, BLOCK: tl.constexpr):
    """kept *= factor; where that is one, nothing is read or written."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(kept + at, mask=at < elements)
        tl.store(kept + at, (x.to(tl.float32) * by).to(kept.dtype.element_ty), mask=at < elements)


def configuration(columns: int, lanes: int = LANES) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants, options) of ``_rows`` for this many classes: 16 elements a thread, 128 to 1024 threads.

    lanes: threads a warp.
    """
    whole = columns <= _WHOLE_ROW
    block = min(_WHOLE_ROW, max(128, triton.next_power_of_2(columns)))
    warps = warps_of(min(1024, max(128, block // 16)), lanes)
    return {"BLOCK": block, "WHOLE": whole}, {"num_warps": warps, "num_stages": 1}


def survey(target: torch.Tensor, ignore_index: int, classes: int) -> torch.Tensor:
    """How many targets count, as a float32 scalar on the device: nothing waits for it."""
    return (target != ignore_index).sum(dtype=torch.float32)


def visit(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    losses: torch.Tensor,
    scale: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> None:
    """As ``kernels.loss.cpu.visit``, but that a row whose target is no class gets NaN."""
    rows, columns = logits.shape
    if not rows:
        return
    constants, options = configuration(columns)
    _rows[(rows,)](
        logits,
        target,
        losses,
        losses if scale is None else scale,
        logits if gradient is None else gradient,
        columns,
        ignore_index,
        smoothing,
        SMOOTHING=smoothing != 0.0,
        GRADIENT=gradient is not None,
        SCALE_PER_ROW=scale is not None and scale.numel() > 1,
        **constants,
        **options,
    )


def total(losses: torch.Tensor, count: Any) -> torch.Tensor:
    """sum(losses) / count as a scalar; NaN where count is 0."""
    return losses.sum() / count


def scale_(kept: torch.Tensor, factor: torch.Tensor) -> None:
    """kept *= factor, a scalar on the device; no bytes move where it is one."""
    if kept.numel():
        programs = triton.cdiv(kept.numel(), _SCALE_BLOCK)
        _scale[(programs,)](kept, factor, kept.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)


_passes = Passes(survey, visit, total)
cross_entropy = _passes.cross_entropy
cross_entropy_with_gradient = _passes.cross_entropy_with_gradient
linear_cross_entropy = _passes.linear_cross_entropy


def compilations() -> list[Compilation]:
    """What is shipped: rows in registers and rows in a loop, in 16 bits and float32, and the scaling."""
    from kernels.ahead_of_time import Compilation

    def rows(operation: str, direction: str, columns: int, element: str, lanes: int = 32) -> Compilation:
        constants, options = configuration(columns, lanes)
        types = {
            "logits": f"*{element}!",
            "target": "*i64!",
            "losses": "*fp32!",
            "scale": "*fp32!",
            "gradient": f"*{element}!",
            "columns": "i32!",
            "ignore_index": "i32",
            "smoothing": "fp32",
        }
        flags = {"SMOOTHING": False, "GRADIENT": direction == "backward", "SCALE_PER_ROW": False}
        targets = targets_by_lanes()[lanes]
        label = f"{operation} {direction} {columns} {element} {lanes} lanes"
        constants.update(flags)
        return Compilation(label, _rows, types, constants, options, operation, direction, targets=targets)

    sizes = ((8192, "bf16"), (50304, "fp32"), (128256, "bf16"))
    found = [rows("cross_entropy", way, *size) for size in sizes for way in ("forward", "backward")]
    found += [rows("cross_entropy", way, 128256, "bf16", 64) for way in ("forward", "backward")]
    found += [rows("linear_cross_entropy", way, 32000, "bf16") for way in ("forward", "backward")]
    types = {"kept": "*bf16!", "factor": "*fp32!", "elements": "i64!"}
    constants = {"BLOCK": _SCALE_BLOCK}
    options = {"num_warps": 8}
    scaled = ("scale bf16", _scale, types, constants, options, "cross_entropy", "backward")
    return [*found, Compilation(*scaled)]
