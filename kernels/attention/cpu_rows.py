"""What attention on the CPU does with one row of scores: what a query sees, its mask, exponentials, dropout.

Scores are kept in units of log2: the scale of the query carries log2(e), so that an exponential is one
polynomial and an addition to the exponent.
"""

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
def exp2_float32(x):
    """2**x for x up to 127; relative error below 2.5e-7; 0 below -126.5, NaN for NaN.

    2**n * 2**r with n = round(x): 2**r is 1 + r p(r), p of degree 4, fitted for least relative error (9.2e-8).
    The exponent field of 2**-127 is zero, so what underflows becomes 0 without a test.
    """
    x = f32(-127.0) if x < f32(-127.0) else x
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = f32(1.326472731e-3) * r + f32(9.671512991e-3)
    p = p * r + f32(5.550733581e-2)
    p = p * r + f32(2.402224243e-1)
    p = p * r + f32(6.931470037e-1)
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


@_inline
def add_mask(scores, at, first, last, mask, mask_at):
    """Add numbers to the scores of keys first to last - 1; key j's score is at at + j, its mask at mask_at + j."""
    for key in range(first, last):
        scores[at + key] += mask[mask_at + key] * LOG2_E


@_inline
def hide(scores, at, first, last, mask, mask_at):
    """-inf where the mask is False."""
    for key in range(first, last):
        scores[at + key] = scores[at + key] if mask[mask_at + key] else f32(-np.inf)


@_inline
def fill(scores, first, last, value):
    for place in range(first, last):
        scores[place] = value


@_inline_sum
def row_maximum(scores, first, last, top):
    for place in range(first, last):
        top = maximum(top, scores[place])
    return top


@_inline_sum
def exponentials(scores, first, last, top):
    """scores -> 2**(scores - top) in place; their sum."""
    total = f32(0)
    for place in range(first, last):
        weight = exp2_float32(scores[place] - top)
        scores[place] = weight
        total += weight
    return total


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
def drop(weights, at, first, last, row, threshold):
    """Zero the weights that dropout takes; key j's weight is at at + j."""
    for key in range(first, last):
        weights[at + key] = weights[at + key] if kept(row, key, threshold) else f32(0)


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
