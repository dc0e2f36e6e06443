"""dQ: a program for each tile of queries, which walks the keys that they see.

The formulas stand in ``gpu_backward.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.gpu_scores import (
    UNSPECIALIZED,
    kept,
    key_ranges,
    load_tile,
    power,
    scaled_scores,
    store_tile,
)


@triton.jit
def _queries_from_keys(
    query_gradient, query_tile, grad_tile, exponent, change, key, value, mask, first, last,
    batch, key_head, start, scale, keep_scale, query_length, key_length, window, seed, threshold,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_row, dropout_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Add to dQ (without the scale) of one tile of queries what the keys first to last give."""
    rows = start + tl.arange(0, ROWS)[:, None]
    for place in tl.range(first, last, COLUMNS):
        columns = place + tl.arange(0, COLUMNS)[None, :]
        key_tile = load_tile(
            key, batch, key_head, place, key_length, stride_key_batch, stride_key_head, stride_key_row,
            COLUMNS, HEAD, WIDTH, DESCRIPTORS, BOUNDED,
        )  # fmt: skip
        value_tile = load_tile(
            value, batch, key_head, place, key_length, stride_value_batch, stride_value_head,
            stride_value_row,
            COLUMNS, HEAD, WIDTH, DESCRIPTORS, BOUNDED,
        )  # fmt: skip
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)
        if BOUNDED or MASK != 0:
            scores = scaled_scores(
                scores, scale, rows, columns, query_length, key_length, window,
                mask, stride_mask_row, CAUSAL, WINDOW, MASK, BOUNDED, NATURAL,
            )  # fmt: skip
            weights = power(NATURAL, scores - exponent[:, None])
        else:
            weights = power(NATURAL, scores * scale - exponent[:, None])
        slope = tl.dot(grad_tile, value_tile.T, input_precision=PRECISION)
        if DROPOUT:
            slope = tl.where(kept(seed, threshold, dropout_head, rows, columns), slope * keep_scale, 0.0)
        slope = weights * (slope - change[:, None])
        query_gradient = tl.dot(slope.to(key_tile.dtype), key_tile, query_gradient, input_precision=PRECISION)
    return query_gradient


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient_kernel(
    query, key, value, mask, grad, exponents, delta, query_gradient,
    scale, final_scale, keep_scale, seed, threshold, heads, group, query_length, padded_length, key_length,
    window,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_query_gradient_batch, stride_query_gradient_head, stride_query_gradient_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS queries of one head, in the forward kernel's order."""
    tiles = tl.cdiv(query_length, ROWS)
    program = tl.program_id(0)
    start = (tiles - 1 - program % tiles) * ROWS
    batch = program // tiles // heads
    head = program // tiles % heads
    key_head = head // group
    query_tile = load_tile(
        query, batch, head, start, query_length, stride_query_batch, stride_query_head, stride_query_row,
        ROWS, HEAD, WIDTH, DESCRIPTORS, True,
    )  # fmt: skip
    grad_tile = load_tile(
        grad, batch, head, start, query_length, stride_grad_batch, stride_grad_head, stride_grad_row,
        ROWS, HEAD, WIDTH, DESCRIPTORS, True,
    )  # fmt: skip
    head_row = (batch * heads + head).to(tl.int64) * padded_length
    rows = start + tl.arange(0, ROWS)
    exponent = tl.load(exponents + head_row + rows)
    change = tl.load(delta + head_row + rows)
    if MASK != 0:
        mask += tl.cast(batch, tl.int64) * stride_mask_batch + tl.cast(head, tl.int64) * stride_mask_head
    first, inner_first, inner_last, last = key_ranges(
        start, key_length, window, ROWS, COLUMNS, CAUSAL, WINDOW
    )
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in tl.static_range(
        3
    ):  # 0 the window's edge (or everything), 1 no edge, 2 the diagonal and the end
        if step == 0:
            begin = first
            stop = inner_first if SPLIT else last
        elif step == 1:
            begin = inner_first
            stop = inner_last
        else:
            begin = inner_last
            stop = last
        if (step == 0 and (WINDOW or not SPLIT)) or (SPLIT and (step == 1 or (step == 2 and EDGE))):
            total = _queries_from_keys(
                total, query_tile, grad_tile, exponent, change, key, value, mask, begin, stop,
                batch, key_head, start, scale, keep_scale, query_length, key_length, window, seed, threshold,
                stride_key_batch, stride_key_head, stride_key_row,
                stride_value_batch, stride_value_head, stride_value_row,
                stride_mask_row, batch * heads + head,
                HEAD, WIDTH, ROWS, COLUMNS, CAUSAL, WINDOW, MASK, DROPOUT,
                DESCRIPTORS, EDGE and step != 1, PRECISION, NATURAL,
            )  # fmt: skip
    store_tile(
        query_gradient, total * final_scale, batch, head, start, query_length,
        stride_query_gradient_batch, stride_query_gradient_head, stride_query_gradient_row,
        ROWS, HEAD, WIDTH,
    )  # fmt: skip
