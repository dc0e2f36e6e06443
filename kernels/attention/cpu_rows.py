"""One row of scores on the CPU: what a query sees, its mask, exponentials, dropout."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.compiled_once import booleans_at, compiled_once, floats_at
from kernels.simd import binary, full_width, log_float32
from kernels.tiles import LANES, ROWS

f32, u32, u64 = np.float32, np.uint32, np.uint64
LOG2_E = f32(1.4426950408889634)
LN_2 = f32(0.6931471805599453)
NONE, ADDED, SEEN = 0, 1, 2
"""Kinds of mask: none, numbers added to the scores, booleans (True: seen)."""

_inline = njit(error_model="numpy", fastmath={"contract"}, forceinline=True)


# kernels.simd.maximum promises LLVM that there is no infinity either, and -inf is what hides a score.
_maximum = binary("llvm.maxnum", ("nnan", "nsz"), "The larger of two floats; one instruction.")


@intrinsic
def _power_of_two(typing, shifted):
    """2**n from n + 1.5 * 2**23, n at least -127 (gives 0): the sum's low bits, moved to the exponent."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.shl(builder.add(builder.bitcast(args[0], word), word(127)), word(23))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32(shifted), codegen) if shifted is types.float32 else None


_ROUND = f32(12582912.0)  # 1.5 * 2**23: the sum's last bit is worth one


@_inline
def exponential(x):
    """e**x for x up to 88; relative error below 4e-7, 1.5e-7 above -20; 0 below -87.7, NaN for NaN.

    2**n * e**r with n = round(x / ln 2). As ``kernels.simd.exp_float32``, without its second half of ln 2
    (which would change e**x by n * 2e-9) and without denormal results: the exponent field of 2**-127 is
    zero, so that what underflows becomes 0 without a test.
    """
    x = f32(-88.02969) if x < f32(-88.02969) else x
    shifted = x * LOG2_E + _ROUND
    r = x - (shifted - _ROUND) * LN_2
    p = f32(1.38144545e-3) * r + f32(8.36877829e-3)
    p = p * r + f32(4.16683766e-2)
    p = p * r + f32(0.1666652)
    p = p * r + f32(0.49999993)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    return p * _power_of_two(shifted)


@_inline
def first_key(query, window):
    """The first key that a query sees by its place."""
    return max(0, query - window + 1) if window > 0 else 0


@_inline
def last_key(query, keys, causal, window):
    """One past the last key that a query sees by its place."""
    return min(keys, query + 1) if causal or window > 0 else keys


@_inline
def group_keys(start, row, count, tile, tile_end, keys, causal, window):
    """(first, one past the last) of a tile's keys that any of the ROWS queries from start + row on sees."""
    first = max(tile, first_key(start + row, window))
    return first, min(tile_end, last_key(start + min(row + ROWS, count) - 1, keys, causal, window))


@_inline
def mask_place(shape, batch, head, query):
    """(byte of a query's first key in the mask, bytes to the next query's); dimensions of 1 are shared."""
    place = (batch if shape[0] > 1 else 0) * shape[1] + (head if shape[1] > 1 else 0)
    place = (place * shape[2] + (query if shape[2] > 1 else 0)) * shape[3]
    return place, shape[3] if shape[2] > 1 else 0


@compiled_once(floats=("factor",))
def copy_rows(target, source, rows, copied, dim, wide, factor):
    """target (rows x wide): ``copied`` rows of dim numbers are factor times the source's, the rest 0."""
    full_width()
    out = floats_at(target, rows * wide)
    if copied < rows or dim < wide:
        for i in range(rows * wide):
            out[i] = f32(0)
    for row in range(copied):
        mine, theirs = floats_at(target + 4 * row * wide, dim), floats_at(source + 4 * row * dim, dim)
        for i in range(dim):
            mine[i] = theirs[i] * factor


@compiled_once(floats=("value",))
def fill(target, count, value):
    full_width()
    out = floats_at(target, count)
    for i in range(count):
        out[i] = value


@compiled_once()
def mask_row(scores, count, kind, mask):
    """Add the numbers at ``mask`` to the scores, or set those to -inf where its booleans are False."""
    full_width()
    row = floats_at(scores, count)
    if kind == ADDED:
        numbers = floats_at(mask, count)
        for i in range(count):
            row[i] += numbers[i]
    elif kind == SEEN:
        booleans = booleans_at(mask, count)
        for i in range(count):
            row[i] = row[i] if booleans[i] else f32(-np.inf)


@compiled_once(fastmath=("contract", "reassoc", "nsz"))
def online_softmax(scores, count, top_at, total_at, sums, wide):
    """A further ``count`` scores of a row, which become weights: exp(score - largest so far).

    top_at, total_at: the largest score and the sum of weights so far. Where the largest grows, the sum of
    weights and the ``wide`` weighted sums shrink with it (Milakov and Gimelshein 2018, algorithm 3).
    """
    full_width()
    row, tops, totals = floats_at(scores, count), floats_at(top_at, 1), floats_at(total_at, 1)
    before = tops[0]
    top = before
    for i in range(count):
        top = _maximum(top, row[i])
    base = f32(0) if top == f32(-np.inf) else top  # -inf - -inf would be NaN
    total = f32(0)
    for i in range(count):
        weight = exponential(row[i] - base)
        row[i] = weight
        total += weight
    shrink = exponential(before - base)
    tops[0], totals[0] = top, totals[0] * shrink + total
    if top != before:
        out = floats_at(sums, wide)
        for i in range(wide):
            out[i] *= shrink


@compiled_once(floats=("keep",))
def finish_row(out, sums, count, top_at, total_at, log_sum_exp, keep):
    """out: keep times the weighted sums over the sum of weights; and top + ln total. Of nothing: 0, -inf."""
    full_width()
    total = floats_at(total_at, 1)[0]
    share = f32(0) if total == f32(0) else keep / total
    result, weighted = floats_at(out, count), floats_at(sums, count)
    for i in range(count):
        result[i] = weighted[i] * share
    floats_at(log_sum_exp, 1)[0] = floats_at(top_at, 1)[0] + log_float32(total)


@compiled_once(floats=("base", "keep", "delta"))
def slopes_of(scores, slopes, count, base, keep, delta):
    """scores -> weights exp(score - base); slopes, dO V^T before, -> weights * (keep * slopes - delta)."""
    full_width()
    row, slope = floats_at(scores, count), floats_at(slopes, count)
    for i in range(count):
        weight = exponential(row[i] - base)
        row[i] = weight
        slope[i] = weight * (keep * slope[i] - delta)


@compiled_once()
def drop(weights, count, first, seed, row, threshold):
    """Zero the weights that dropout takes among the keys from ``first`` on, in row ``row`` of all rows.

    A weight is kept where a hash of 32 bits is not below the threshold p * 2**32. The row gives 32 bits by
    splitmix64 (Steele et al. 2014), the key is mixed in by lowbias32 (Wellons 2018).
    """
    full_width()
    z = u64(seed) * u64(0x9E3779B97F4A7C15) + u64(row)
    z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
    start = u32((z ^ (z >> u64(31))) >> u64(32))
    out = floats_at(weights, count)
    for i in range(count):
        x = u32(start ^ u32(u32(first + i) * u32(0x9E3779B9)))
        x = u32(u32(x ^ (x >> u32(16))) * u32(0x7FEB352D))
        x = u32(u32(x ^ (x >> u32(15))) * u32(0x846CA68B))
        x = u32(x ^ (x >> u32(16)))
        out[i] = out[i] if x >= u32(threshold) else f32(0)


def threshold_of(dropout_p: float) -> int:
    """The hash below which a weight is dropped; 0 for none."""
    return min(2**32 - 1, round(dropout_p * 2**32))


def up(places: int) -> int:
    """The next multiple of ``LANES``."""
    return -(-places // LANES) * LANES


def mask_arguments(mask: torch.Tensor | None) -> tuple[int, int, torch.Tensor]:
    """(kind, bytes of an element, the mask as bytes); None is a stand-in of one byte."""
    if mask is None:
        return NONE, 1, torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    if mask.dtype == torch.bool:
        return SEEN, 1, mask.view(torch.uint8)
    return ADDED, 4, mask.float().view(torch.uint8)
