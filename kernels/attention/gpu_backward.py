"""Attention backward in Triton: FlashAttention-2's (Dao 2023, arXiv 2307.08691) in three kernels.

With P = exp(S - log_sum_exp), dP = dO V^T and delta = rowsum(O * dO):

    dV = P^T dO        dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

One kernel computes delta, one dK and dV (a program for each tile of keys, which walks the queries of all
heads that share them), one dQ (a program for each tile of queries, which walks the keys). The scores are
computed in both, seven products instead of five, and in return nothing is added atomically: the same bits
on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention.gpu_scores import LOG2_E, kept, key_ranges, load_tile, power, scaled_scores, store_tile
from kernels.attention.gpu_tiles import (
    Tile,
    broadcast_mask,
    dropout_numbers,
    handed,
    natural,
    padded,
    score_scale,
    tile_for,
    unit_stride,
)

LARGEST_TILE = 128
"""Queries of the largest tile: the lengths of delta and exponents are padded to a multiple."""

_UNSPECIALIZED = ["query_length", "key_length", "window", "seed", "threshold"]


@triton.jit(do_not_specialize=["query_length"])
def delta_kernel(
    output, grad, log_sum_exp, delta, exponent, heads, query_length, padded_length,
    stride_output_batch, stride_output_head, stride_output_row,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(output * grad) and exponent = log_sum_exp in the scores' base, both (batch, heads,
    padded length).

    The exponent of rows that saw nothing or do not exist is +inf, which makes all their weights zero; the
    other kernels then need no bounds on queries.
    """
    tiles = padded_length // ROWS
    program = tl.program_id(0)
    start = program % tiles * ROWS
    batch = program // tiles // heads
    head = program // tiles % heads
    output_tile = load_tile(
        output, batch, head, start, query_length, stride_output_batch, stride_output_head, stride_output_row,
        ROWS, HEAD, WIDTH, "", True,
    )  # fmt: skip
    grad_tile = load_tile(
        grad, batch, head, start, query_length, stride_grad_batch, stride_grad_head, stride_grad_row,
        ROWS, HEAD, WIDTH, "", True,
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    row = (batch * heads + head).to(tl.int64)
    tl.store(
        delta + row * padded_length + rows, tl.sum(output_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    )
    sums = tl.load(log_sum_exp + row * query_length + rows, mask=rows < query_length, other=float("inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums)
    if not NATURAL:
        sums *= LOG2_E
    tl.store(exponent + row * padded_length + rows, sums)


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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    dropout_p: float,
    seed: int,
    is_causal: bool,
    scale: float,
    window: int,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, from ``gpu_forward.attention``'s arguments and outputs.

    tiles: others than ``configuration``'s for keys with values and for queries, to compare them.
    """
    if scale < 0:
        query_gradient, *others = attention_backward(
            grad, -query, key, value, mask, output, log_sum_exp, dropout_p, seed, is_causal, -scale,
            window, tiles
        )  # fmt: skip
        return (-query_gradient, *others)
    grad, query, key, value, output = (unit_stride(tensor) for tensor in (grad, query, key, value, output))
    batch, heads, length, dim = query.shape
    key_heads, keys = key.shape[1:3]
    gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
    if not query.numel() or not key.numel():
        return tuple(gradient.zero_() for gradient in gradients)
    query_gradient, key_gradient, value_gradient = gradients
    causal, grouped, split = is_causal or window > 0, heads != key_heads, mask is None and dropout_p == 0
    key_tile, query_tile = tiles or (
        tile_for(direction, not split, query, key, value, grad)
        for direction in ("backward keys", "backward queries")
    )
    padded_length = triton.cdiv(length, LARGEST_TILE) * LARGEST_TILE
    delta, exponents = log_sum_exp.new_empty((2, batch, heads, padded_length))
    rows = 64
    delta_kernel[(padded_length // rows * heads * batch,)](
        output, grad, log_sum_exp, delta, exponents, heads, length, padded_length,
        *output.stride()[:3], *grad.stride()[:3],
        HEAD=dim, WIDTH=padded(dim), ROWS=rows, NATURAL=natural(query), num_warps=4,
    )  # fmt: skip

    mask_source, mask_strides, mask_kind = broadcast_mask(mask, query, key)
    numbers = (
        score_scale(scale, query), scale, *dropout_numbers(dropout_p, seed), heads, heads // key_heads,
        length, padded_length, keys, window, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *mask_strides,
        *grad.stride()[:3],
    )  # fmt: skip
    switches: dict[str, Any] = {
        "HEAD": dim, "WIDTH": padded(dim), "CAUSAL": causal, "WINDOW": window > 0, "MASK": mask_kind,
        "DROPOUT": dropout_p > 0,
    }  # fmt: skip
    tile = key_tile
    (queries, grads, *others), descriptors = handed(
        (query, grad, key, value), (tile.rows, tile.rows, tile.columns, tile.columns), tile
    )
    key_value_gradient_kernel[(triton.cdiv(keys, tile.columns) * key_heads * batch,)](
        queries, *others, mask_source, grads, exponents, delta, key_gradient, value_gradient,
        *numbers, *key_gradient.stride()[:3], *value_gradient.stride()[:3], **switches,
        GROUPED=grouped, SPLIT=split and not grouped and not window, ROWS=tile.rows, COLUMNS=tile.columns,
        DESCRIPTORS=descriptors, PRECISION=tile.precision, NATURAL=natural(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = query_tile
    (queries, grads, *others), descriptors = handed(
        (query, grad, key, value), (tile.rows, tile.rows, tile.columns, tile.columns), tile
    )
    query_gradient_kernel[(triton.cdiv(length, tile.rows) * heads * batch,)](
        queries, *others, mask_source, grads, exponents, delta, query_gradient,
        *numbers, *query_gradient.stride()[:3], **switches,
        EDGE=causal or keys % tile.columns != 0, SPLIT=split,
        ROWS=tile.rows, COLUMNS=tile.columns, DESCRIPTORS=descriptors, PRECISION=tile.precision,
        NATURAL=natural(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return query_gradient, key_gradient, value_gradient
