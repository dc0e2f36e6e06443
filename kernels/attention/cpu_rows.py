"""What attention on the CPU does with one row of scores: what a query sees, its mask, exponentials, dropout."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.simd import maximum
from kernels.tiles import LANES, ROWS

f32, u32, u64 = np.float32, np.uint32, np.uint64
LOG2_E = f32(1.4426950408889634)
LN_2 = f32(0.6931471805599453)
NONE, ADDED, SEEN = 0, 1, 2
"""Kinds of mask: none, numbers added to the scores, booleans (True: seen)."""

_inline = njit(error_model="numpy", fastmath={"contract"}, forceinline=True)
_inline_sum = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, forceinline=True)


@intrinsic
def _power_of_two(typing, shifted):
    """2**n from n + 1.5 * 2**23, n at least -127 (gives 0): the low bits of the sum, moved to the exponent."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.shl(builder.add(builder.bitcast(args[0], word), word(127)), word(23))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32(shifted), codegen) if shifted is types.float32 else None


_ROUND = f32(12582912.0)  # 1.5 * 2**23: the sum's last bit is worth one


@_inline
def exponential(x):
    """e**x for x up to 88; relative error below 2e-7 (1 ulp above -20); 0 below -87.7, NaN for NaN.

    2**n * e**r with n = round(x / ln 2). As ``kernels.simd.exp_float32``, without its second half of ln 2 (which
    would change e**x by n * 2e-9) and without denormal results: the exponent field of 2**-127 is zero, so that
    what underflows becomes 0 without a test.
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
    """(first, one past the last) of the keys of a tile that any of the ROWS queries from start + row on sees."""
    first = max(tile, first_key(start + row, window))
    return first, min(tile_end, last_key(start + min(row + ROWS, count) - 1, keys, causal, window))


@_inline
def mask_place(shape, batch, head, query):
    """(place of the mask of this query's first key, distance to the next query's); dimensions of 1 are shared."""
    place = (batch if shape[0] > 1 else 0) * shape[1] + (head if shape[1] > 1 else 0)
    place = (place * shape[2] + (query if shape[2] > 1 else 0)) * shape[3]
    return place, shape[3] if shape[2] > 1 else 0


# Places are counted from the first on and unsigned: numba tests a signed index for being negative (Python's
# places from the end), and that test keeps a loop scalar.


@_inline
def add_mask(scores, at, mask, mask_at, count):
    """scores[at + i] += mask[mask_at + i], i < count."""
    for i in range(count):
        scores[u64(at) + u64(i)] += mask[u64(mask_at) + u64(i)]


@_inline
def hide(scores, at, mask, mask_at, count):
    """scores[at + i] = -inf where mask[mask_at + i] is False, i < count."""
    for i in range(count):
        score = scores[u64(at) + u64(i)]
        scores[u64(at) + u64(i)] = score if mask[u64(mask_at) + u64(i)] else f32(-np.inf)


@_inline
def fill(scores, at, count, value):
    for i in range(count):
        scores[u64(at) + u64(i)] = value


@_inline
def scale_by(values, at, count, factor):
    for i in range(count):
        values[u64(at) + u64(i)] *= factor


@_inline_sum
def row_maximum(scores, at, count, top):
    for i in range(count):
        top = maximum(top, scores[u64(at) + u64(i)])
    return top


@_inline_sum
def exponentials(scores, at, count, top):
    """scores -> exp(scores - top) in place; their sum."""
    total = f32(0)
    for i in range(count):
        weight = exponential(scores[u64(at) + u64(i)] - top)
        scores[u64(at) + u64(i)] = weight
        total += weight
    return total


@_inline
def slopes_of(scores, slopes, at, count, base, keep, delta):
    """scores -> weights exp(scores - base); slopes, dO V^T before, -> weights * (keep * slopes - delta)."""
    for i in range(count):
        place = u64(at) + u64(i)
        weight = exponential(scores[place] - base)
        scores[place] = weight
        slopes[place] = weight * (keep * slopes[place] - delta)


@_inline
def row_seed(seed, row):
    """32 bits for one row of one (batch, head): splitmix64 (Steele et al. 2014) of the seed and the row's number."""
    z = u64(seed) * u64(0x9E3779B97F4A7C15) + u64(row)
    z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
    return u32((z ^ (z >> u64(31))) >> u64(32))


@_inline
def kept(row, key, threshold):
    """Whether dropout keeps this key's weight: a hash of 32 bits (Wellons 2018, lowbias32) against p * 2**32."""
    x = u32(row ^ u32(u32(key) * u32(0x9E3779B9)))
    x = u32(x ^ (x >> u32(16)))
    x = u32(x * u32(0x7FEB352D))
    x = u32(x ^ (x >> u32(15)))
    x = u32(x * u32(0x846CA68B))
    x = u32(x ^ (x >> u32(16)))
    return x >= threshold


@_inline
def drop(weights, at, first, count, row, threshold):
    """Zero the weights that dropout takes; at: place of the weight of key ``first``."""
    for i in range(count):
        weight = weights[u64(at) + u64(i)]
        weights[u64(at) + u64(i)] = weight if kept(row, first + i, threshold) else f32(0)


def threshold_of(dropout_p: float) -> int:
    """The hash below which a weight is dropped; 0 for none."""
    return min(2**32 - 1, round(dropout_p * 2**32))


def up(places: int) -> int:
    """The next multiple of ``LANES``."""
    return -(-places // LANES) * LANES


def mask_arguments(mask: torch.Tensor | None) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(kind, numbers to add, booleans) of a mask; what does not apply is a stand-in of one element."""
    nothing = torch.zeros(1, 1, 1, 1)
    if mask is None:
        return NONE, nothing, nothing.bool()
    if mask.dtype == torch.bool:
        return SEEN, nothing, mask
    return ADDED, mask.float(), nothing.bool()
