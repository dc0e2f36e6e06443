"""What the forward and the backward attention kernels share: tiles, what a query may see, dropout.

Rows are queries and columns are keys throughout. ``rows`` and ``columns`` are index tensors of shapes that
broadcast against each other, so that one function serves a tile of scores (queries x keys) and its
transpose (keys x queries), which is what the gradient of keys and values needs.

Scores of 16-bit tensors are kept in base 2: the scale is multiplied by log2(e) once, so that a scale, a
shift and the exponential are one multiply-add and the one instruction that the hardware has. float32 keeps
the natural base (NATURAL): log_sum_exp is the natural one, and to convert it would cost a rounding of its
size each way.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
UNSPECIALIZED = ["query_length", "key_length", "window", "seed", "threshold"]
"""Arguments whose values make no kernel of their own."""


@triton.jit
def describe(
    pointer, batch, head, length, stride_batch, stride_head, stride_row,
    HEAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A descriptor of one head, (length, HEAD), made on the device: the only kind that Triton's warp
    specialisation takes on Hopper."""
    return tl.make_tensor_descriptor(
        pointer + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head,
        shape=[length, HEAD],
        strides=[stride_row, 1],
        block_shape=[ROWS, WIDTH],
    )


@triton.jit
def load_tile(
    source, batch, head, start, length, stride_batch, stride_head, stride_row,
    ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows start to start + ROWS of one head, (ROWS, WIDTH), zero beyond the length and the head dimension.

    DESCRIPTORS: what the source is: "" a pointer, "host" a descriptor of all heads, "device" one of this
    head. Without BOUNDED the rows are promised to be inside. Offsets are 64 bit.
    """
    if DESCRIPTORS == "device":
        tile = source.load([start, 0])
    elif DESCRIPTORS == "host":
        tile = source.load([batch, head, start, 0]).reshape(ROWS, WIDTH)
    else:
        offset = tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        first = source + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head
        first += tl.cast(start, tl.int64) * stride_row
        places = first + offset.to(tl.int64)[:, None] * stride_row + column[None, :]
        if BOUNDED:
            inside = (start + offset < length)[:, None]
            if HEAD != WIDTH:
                inside = inside & (column < HEAD)[None, :]
            tile = tl.load(places, mask=inside, other=0.0)
        elif HEAD != WIDTH:
            tile = tl.load(places, mask=(column < HEAD)[None, :], other=0.0)
        else:
            tile = tl.load(places)
    return tile


@triton.jit
def store_tile(
    target, tile, batch, head, start, length, stride_batch, stride_head, stride_row,
    ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write (ROWS, WIDTH) to the rows from start of one head, nothing beyond length and head dimension."""
    offset = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    first = target + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head
    first += tl.cast(start, tl.int64) * stride_row
    places = first + offset.to(tl.int64)[:, None] * stride_row + column[None, :]
    inside = (start + offset < length)[:, None] & (column < HEAD)[None, :]
    tl.store(places, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def key_ranges(
    start, key_length, window,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys the queries start to start + ROWS see: (first, inner_first, inner_last, last).

    first to last holds all of them; no tile of COLUMNS keys from inner_first to inner_last crosses an edge.
    All but last are multiples of COLUMNS.
    """
    first = 0
    last = key_length
    inner_first = 0
    inner_last = key_length // COLUMNS * COLUMNS
    if CAUSAL:
        last = tl.minimum(last, start + ROWS)
        inner_last = tl.minimum(inner_last, (start + 1) // COLUMNS * COLUMNS)
    if WINDOW:
        first = tl.maximum(0, start - window + 1) // COLUMNS * COLUMNS
        inner_first = tl.cdiv(tl.maximum(0, start + ROWS - window), COLUMNS) * COLUMNS
        inner_first = tl.minimum(tl.maximum(inner_first, first), tl.cdiv(last, COLUMNS) * COLUMNS)
        inner_last = tl.maximum(inner_last, inner_first)
    return first, inner_first, inner_last, last


@triton.jit
def power(NATURAL: tl.constexpr, exponent):
    """e or 2 to the exponent."""
    return tl.exp(exponent) if NATURAL else tl.exp2(exponent)


@triton.jit
def scaled_scores(
    products, scale, rows, columns, query_length, key_length, window,
    mask, stride_mask_row,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BOUNDED: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """query . key times scale with the mask added, -inf where the query may not see the key.

    mask points at this head's (query length, key length), keys contiguous; MASK is 0 for none, 1 for
    boolean (true: seen), 2 for additive. BOUNDED: the tile may cross an edge (the key length, the diagonal,
    the window).
    """
    scores = products * scale
    if MASK != 0:
        places = mask + rows.to(tl.int64) * stride_mask_row + columns
        inside = (rows < query_length) & (columns < key_length)
        if MASK == 1:
            scores = tl.where(tl.load(places, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            added = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            scores += added if NATURAL else added * LOG2_E
    if BOUNDED:
        seen = columns < key_length
        if CAUSAL:
            seen = seen & (columns <= rows)
        if WINDOW:
            seen = seen & (columns > rows - window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def kept(seed, threshold, head, rows, columns):
    """Which probabilities dropout keeps: one Philox number for each (batch * heads + head, query, key).

    The counter names the element, so that the backward kernels, which walk the scores in another order,
    draw the same numbers. threshold: dropout probability times 2^32.
    """
    bits, _, _, _ = tl.philox(seed, columns, rows, head, 0)
    return bits >= threshold.to(tl.uint32)
