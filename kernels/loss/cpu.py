"""Cross entropy on the CPU: a row of logits comes from memory once, for the loss and its gradient.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3: the sum of
exponentials is rescaled whenever the maximum grows. Here a block of the row at a time: its maximum while it
comes from memory, its exponentials from the cache, kept in a buffer of one row. When the row's end is
reached, the gradient is the buffer times one factor a block: one exponential an element, and one trip to
memory each for logits and gradient.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.loss.passes import Passes
from kernels.simd import exp_nonpositive_float32, full_width, maximum, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import goes_past
from kernels.threads import chunked, chunks_of

f32 = np.float32
_SUM = ("reassoc", "contract", "nsz")
# Elements of a block. With stores to come, reading is best one long stream; a loss alone is best computed on
# what has just arrived.
_BLOCK = 16384
_LOSS_BLOCK = 1024

_piece = numba.njit(error_model="numpy", fastmath=set(_SUM), forceinline=True)


@intrinsic
def _stream_scaled_16(typing: Any, target: Any, source: Any, offset: Any, factor: Any, less: Any) -> Any:
    """target[offset:offset+16] = source[offset:offset+16] * factor - less, written past the caches.

    As ``kernels.simd.stream_16``, which says what must be aligned, but the product makes no trip to memory.
    """
    wanted = types.Array(types.float32, 1, "C")
    if target != wanted or source != wanted or factor is not types.float32 or less is not types.float32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), 16)
        pointers = []
        for kind, value in zip(signature.args[:2], args[:2], strict=True):
            data = context.make_array(kind)(context, builder, value).data
            pointers.append(builder.bitcast(builder.gep(data, [args[2]]), vector.as_pointer()))
        numbers = builder.load(pointers[1])
        numbers.align = 4
        spread = []
        for value in args[3:]:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            spread.append(builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes))
        product = builder.fmul(numbers, spread[0], flags=("contract",))
        store = builder.store(builder.fsub(product, spread[1], flags=("contract",)), pointers[0])
        store.align = 64
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, source, offset, factor, less), codegen


@_piece
def _highest(x: Any) -> Any:
    """The largest of some logits."""
    full_width()
    highest = f32(-np.inf)
    for j in range(x.size):
        highest = maximum(highest, widen(x[j]))
    return highest


@_piece
def _exponentials(x: Any, base: Any, wanted: Any, kept: Any) -> Any:
    """The sum of exp(x - base); each of them in ``kept`` if wanted."""
    full_width()
    added = f32(0)
    if wanted:
        for j in range(x.size):
            kept[j] = exp_nonpositive_float32(widen(x[j]) - base)
            added += kept[j]
    else:
        for j in range(x.size):
            added += exp_nonpositive_float32(widen(x[j]) - base)
    return added


@_piece
def _shifted_sum(x: Any, base: Any) -> Any:
    full_width()
    shifted = f32(0)
    for j in range(x.size):
        shifted += widen(x[j]) - base
    return shifted


@_piece
def _scaled(kept: Any, factor: Any, less: Any, out: Any, past: Any) -> None:
    """out = kept * factor - less; streamed if past, out's distance from a line of the cache, is 0 or more."""
    full_width()
    if past is not None and past >= 0:
        head = min(-past % 16, kept.size)
        for j in range(head):
            out[j] = kept[j] * factor - less
        while head + 16 <= kept.size:
            _stream_scaled_16(out, kept, head, factor, less)
            head += 16
        kept, out = kept[head:], out[head:]
    for j in range(kept.size):
        out[j] = narrow(kept[j] * factor - less, out)


@chunked(fastmath=_SUM)
def _rows(
    chunk: Any,
    chunks: Any,
    x: Any,
    target: Any,
    ignore_index: Any,
    smoothing: Any,
    losses: Any,
    wanted: Any,
    scale: Any,
    gradient: Any,
    past: Any,
) -> None:
    """Losses of rows, and where ``wanted``, the gradient of sum(scale * losses).

    scale: one element for all rows or one a row. gradient may be x itself. past: where it is 0 or more, the
    gradient is streamed, and begins so many elements past a multiple of 64 bytes; None for 16-bit floats.
    """
    rows, columns = x.shape
    size = _BLOCK if wanted else _LOSS_BLOCK
    blocks = (columns + size - 1) // size
    tops = np.empty(blocks, np.float32)
    numbers = np.empty(columns if wanted else 0, np.float32)
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        label = target[i]
        if label == ignore_index:
            losses[i] = f32(0)
            if wanted:
                for j in range(columns):
                    gradient[i, j] = narrow(f32(0), gradient)
            continue
        top, total = f32(-np.inf), f32(0)
        logits_sum = 0.0  # only with smoothing
        chosen = widen(x[i, label])
        for block in range(blocks):
            # Views that begin at zero: with an index that might be negative, numba's loops gather.
            part = x[i, block * size : (block + 1) * size]
            kept = numbers[block * size : (block + 1) * size]
            highest = _highest(part)
            tops[block] = highest
            base = f32(0) if highest == f32(-np.inf) else highest
            added = _exponentials(part, base, wanted, kept)
            if smoothing != 0.0:
                logits_sum += np.float64(_shifted_sum(part, base)) + np.float64(base) * part.size
            if added != f32(0):  # else all are -inf, which add nothing
                new = maximum(top, highest)
                rescaled = total * exp_nonpositive_float32(top - new) if total != f32(0) else f32(0)
                total = rescaled + added * exp_nonpositive_float32(highest - new)
                top = new
        loss = np.log(np.float64(total)) - (1.0 - smoothing) * np.float64(chosen - top)
        if smoothing != 0.0:
            loss -= smoothing * (logits_sum / columns - np.float64(top))
        losses[i] = f32(loss)
        if wanted:
            weight = scale[i] if scale.size > 1 else scale[0]
            floor = f32(weight * smoothing / columns)
            step = f32(weight * (1.0 - smoothing))
            for block in range(blocks):
                first = block * size
                begin = past
                if begin is not None and begin >= 0:
                    begin += i * columns + first
                factor = exp_nonpositive_float32(tops[block] - top) * (weight / total)
                kept, out = numbers[first : first + size], gradient[i, first : first + size]
                _scaled(kept, factor, floor, out, begin)
                if first <= label < first + size:
                    gradient[i, label] = narrow(numbers[label] * factor - floor - step, gradient)
    if past is not None and past >= 0:
        store_fence()


@chunked
def _survey(chunk: Any, target: Any, ignore_index: Any, classes: Any, found: Any) -> None:
    """How many targets count, and the place of the first that is no class (-1: none)."""
    found[0], found[1] = 0, -1
    for i in range(target.size):
        if target[i] != ignore_index:
            found[0] += 1
            if not 0 <= target[i] < classes and found[1] < 0:
                found[1] = i


@chunked
def _sum(chunk: Any, losses: Any, count: Any, out: Any) -> None:
    """Sum / count, in float64 and in order: the number of threads does not show."""
    total = 0.0
    for i in range(losses.size):
        total += np.float64(losses[i])
    out[0] = f32(total / count)


def survey(target: torch.Tensor, ignore_index: int, classes: int) -> int:
    """How many targets count. IndexError, as torch's, where one is no class."""
    found = torch.empty(2, dtype=torch.int64)
    _survey(1, target, ignore_index, classes, found)
    count, wrong = found.tolist()
    if wrong >= 0:
        raise IndexError(
            f"Target {int(target[wrong])} is out of bounds: target {wrong} must be a class, 0 to "
            f"{classes - 1}, or ignore_index={ignore_index}"
        )
    return count


def visit(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    losses: torch.Tensor,
    scale: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> None:
    """Write the float32 losses of rows; with ``gradient``, also that of sum(scale * losses) there.

    logits: (rows, classes), contiguous; gradient may be the same memory. scale: float32, one element or one a
    row. Targets must have passed ``survey``.
    """
    rows, columns = logits.shape
    streamed = gradient is not None and gradient is not logits and goes_past(gradient)
    past = None
    if logits.dtype is torch.float32:
        past = gradient.data_ptr() % 64 // 4 if gradient is not None and streamed else -1
    # Without a gradient nothing is read or written through these two: one compiled function for both.
    rest = (0, losses, logits) if gradient is None else (1, scale, gradient)
    chunks = chunks_of(rows, 1 + 8192 // max(1, columns))
    _rows(chunks, chunks, logits, target, ignore_index, smoothing, losses, *rest, past)


def total(losses: torch.Tensor, count: int) -> torch.Tensor:
    """sum(losses) / count as a scalar; NaN where count is 0."""
    out = torch.empty(1, dtype=torch.float32)
    _sum(1, losses, count, out)
    return out.view(())


_passes = Passes(survey, visit, total)
cross_entropy = _passes.cross_entropy
cross_entropy_with_gradient = _passes.cross_entropy_with_gradient
linear_cross_entropy = _passes.linear_cross_entropy
