"""dK and dV: a program for each tile of keys, which walks the queries of all heads that share them.

The formulas stand in ``gpu_backward.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.gpu_scores import UNSPECIALIZED, kept, load_tile, power, scaled_scores, store_tile


@triton.jit
def _keys_from_queries(
    key_gradient, value_gradient, key_tile, value_tile, query, grad, exponents, delta, mask, first, last,
    batch, head, head_row, start, scale, keep_scale, query_length, key_length, window, seed, threshold,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_mask_row, dropout_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Add to dK (without the scale) and dV of one tile of keys what the queries first to last give.

    The scores are transposed, keys x queries, so that both products take them as they are.
    """
    columns = start + tl.arange(0, COLUMNS)[:, None]
    for place in tl.range(first, last, ROWS):
        query_tile = load_tile(
            query, batch, head, place, query_length, stride_query_batch, stride_query_head, stride_query_row,
            ROWS, HEAD, WIDTH, DESCRIPTORS, True,
        )  # fmt: skip
        grad_tile = load_tile(
            grad, batch, head, place, query_length, stride_grad_batch, stride_grad_head, stride_grad_row,
            ROWS, HEAD, WIDTH, DESCRIPTORS, True,
        )  # fmt: skip
        rows = place + tl.arange(0, ROWS)[None, :]
        exponent = tl.load(exponents + head_row + place + tl.arange(0, ROWS))[None, :]
        scores = tl.dot(key_tile, query_tile.T, input_precision=PRECISION)
        if BOUNDED or MASK != 0:
            scores = scaled_scores(
                scores, scale, rows, columns, query_length, key_length, window,
                mask, stride_mask_row, CAUSAL, WINDOW, MASK, BOUNDED, NATURAL,
            )  # fmt: skip
            weights = power(NATURAL, scores - exponent)
        else:
            weights = power(NATURAL, scores * scale - exponent)
        # The order of what follows keeps few tiles alive at a time: registers are what limits the tile's
        # size.
        if DROPOUT:
            keep = kept(seed, threshold, dropout_head, rows, columns)
            used = tl.where(keep, weights * keep_scale, 0.0)
        else:
            used = weights
        value_gradient = tl.dot(
            used.to(grad_tile.dtype), grad_tile, value_gradient, input_precision=PRECISION
        )
        slope = tl.dot(value_tile, grad_tile.T, input_precision=PRECISION)
        if DROPOUT:
            slope = tl.where(keep, slope * keep_scale, 0.0)
        change = tl.load(delta + head_row + place + tl.arange(0, ROWS))[None, :]
        slope = weights * (slope - change)
        key_gradient = tl.dot(slope.to(query_tile.dtype), query_tile, key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_value_gradient_kernel(
    query, key, value, mask, grad, exponents, delta, key_gradient, value_gradient,
    scale, final_scale, keep_scale, seed, threshold, heads, group, query_length, padded_length, key_length,
    window,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_key_gradient_batch, stride_key_gradient_head, stride_key_gradient_row,
    stride_value_gradient_batch, stride_value_gradient_head, stride_value_gradient_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """One tile of COLUMNS keys of one key head. The first keys, seen by most queries, start first."""
    tiles = tl.cdiv(key_length, COLUMNS)
    program = tl.program_id(0)
    key_heads = heads // group
    start = program % tiles * COLUMNS
    batch = program // tiles // key_heads
    key_head = program // tiles % key_heads
    key_tile = load_tile(
        key, batch, key_head, start, key_length, stride_key_batch, stride_key_head, stride_key_row,
        COLUMNS, HEAD, WIDTH, DESCRIPTORS, True,
    )  # fmt: skip
    value_tile = load_tile(
        value, batch, key_head, start, key_length, stride_value_batch, stride_value_head, stride_value_row,
        COLUMNS, HEAD, WIDTH, DESCRIPTORS, True,
    )  # fmt: skip

    first = 0
    last = query_length
    inner_first = 0  # the tiles of queries from inner_first to inner_last cross no edge
    if CAUSAL:
        first = start // ROWS * ROWS
        inner_first = tl.cdiv(start + COLUMNS - 1, ROWS) * ROWS
    if WINDOW:
        last = tl.minimum(last, start + COLUMNS - 1 + window)
    end = tl.maximum(tl.cdiv(last, ROWS) * ROWS, first)
    inner_first = tl.minimum(inner_first, end)
    inner_last = end
    if WINDOW:
        inner_last = tl.maximum(tl.minimum(end, (start + window) // ROWS * ROWS), inner_first)

    key_total = tl.zeros((COLUMNS, WIDTH), tl.float32)
    value_total = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for member in tl.range(0, group if GROUPED else 1):
        head = key_head * group + member
        dropout_head = batch * heads + head
        head_row = dropout_head.to(tl.int64) * padded_length
        if MASK != 0:
            head_mask = (
                mask
                + tl.cast(batch, tl.int64) * stride_mask_batch
                + tl.cast(head, tl.int64) * stride_mask_head
            )
        else:
            head_mask = mask
        for step in tl.static_range(3):  # 0 the diagonal (or everything), 1 no edge, 2 the window's far edge
            if step == 0:
                begin = first
                stop = inner_first if SPLIT else end
            elif step == 1:
                begin = inner_first
                stop = inner_last
            else:
                begin = inner_last
                stop = end
            if (step == 0 and (CAUSAL or not SPLIT)) or (SPLIT and (step == 1 or (step == 2 and WINDOW))):
                key_total, value_total = _keys_from_queries(
                    key_total, value_total, key_tile, value_tile, query, grad, exponents, delta, head_mask,
                    begin, stop, batch, head, head_row, start, scale, keep_scale,
                    query_length, key_length, window, seed, threshold,
                    stride_query_batch, stride_query_head, stride_query_row,
                    stride_grad_batch, stride_grad_head, stride_grad_row,
                    stride_mask_row, dropout_head,
                    HEAD, WIDTH, ROWS, COLUMNS, CAUSAL, WINDOW, MASK, DROPOUT,
                    DESCRIPTORS, CAUSAL and step != 1, PRECISION, NATURAL,
                )  # fmt: skip
    store_tile(
        value_gradient, value_total, batch, key_head, start, key_length,
        stride_value_gradient_batch, stride_value_gradient_head, stride_value_gradient_row,
        COLUMNS, HEAD, WIDTH,
    )  # fmt: skip
    store_tile(
        key_gradient, key_total * final_scale, batch, key_head, start, key_length,
        stride_key_gradient_batch, stride_key_gradient_head, stride_key_gradient_row,
        COLUMNS, HEAD, WIDTH,
    )  # fmt: skip
