"""Attention forward in Triton: FlashAttention-2's online softmax (Dao 2023, arXiv 2307.08691)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.gpu_scores import (
    LN_2,
    UNSPECIALIZED,
    describe,
    kept,
    key_ranges,
    load_tile,
    power,
    scaled_scores,
    store_tile,
)
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


@triton.jit
def _attend(
    accumulator, total, largest, query_tile, key, value, mask, first, last,
    batch, head, key_head, start, scale, query_length, key_length, window, seed, threshold,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_row, dropout_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BOUNDED: tl.constexpr, SPECIALIZED: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """Take the keys first to last (multiples of COLUMNS) into the running sums of one tile of queries."""
    rows = start + tl.arange(0, ROWS)[:, None]
    for place in tl.range(first, last, COLUMNS, warp_specialize=SPECIALIZED):
        columns = place + tl.arange(0, COLUMNS)[None, :]
        key_tile = load_tile(
            key, batch, key_head, place, key_length, stride_key_batch, stride_key_head, stride_key_row,
            COLUMNS, HEAD, WIDTH, DESCRIPTORS, BOUNDED,
        )  # fmt: skip
        if DROPOUT:
            keep = kept(seed, threshold, dropout_head, rows, columns)
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)
        if BOUNDED or MASK != 0:
            scores = scaled_scores(
                scores, scale, rows, columns, query_length, key_length, window,
                mask, stride_mask_row, CAUSAL, WINDOW, MASK, BOUNDED, NATURAL,
            )  # fmt: skip
            highest = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet
            weights = power(NATURAL, scores - shift[:, None])
        else:
            highest = tl.maximum(largest, tl.max(scores, 1) * scale)
            shift = highest
            weights = power(NATURAL, scores * scale - highest[:, None])  # one FMA and one exp2 an element
        correction = power(NATURAL, largest - shift)
        total = total * correction + tl.sum(weights, 1)
        largest = highest
        accumulator = accumulator * correction[:, None]
        if DROPOUT:
            weights = tl.where(keep, weights, 0.0)
        value_tile = load_tile(
            value, batch, key_head, place, key_length, stride_value_batch, stride_value_head,
            stride_value_row,
            COLUMNS, HEAD, WIDTH, DESCRIPTORS, BOUNDED,
        )  # fmt: skip
        accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)
    return accumulator, total, largest


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_kernel(
    query, key, value, mask, output, log_sum_exp, scale, keep_scale, seed, threshold,
    heads, group, query_length, key_length, window,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row,
    stride_output_batch, stride_output_head, stride_output_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS queries of one head. query, key and value are pointers or descriptors."""
    tiles = tl.cdiv(query_length, ROWS)
    program = tl.program_id(0)
    # The last tile of a head sees most keys under a causal mask: it starts first, so that the light tiles
    # fill the end. All tiles of a head, and the heads that share keys, are neighbours: one copy in the L2.
    start = (tiles - 1 - program % tiles) * ROWS
    batch = program // tiles // heads
    head = program // tiles % heads
    key_head = head // group
    if DESCRIPTORS == "device":
        query_source = describe(
            query, batch, head, query_length,
            stride_query_batch, stride_query_head, stride_query_row, HEAD, ROWS, WIDTH,
        )  # fmt: skip
        key_source = describe(
            key, batch, key_head, key_length,
            stride_key_batch, stride_key_head, stride_key_row, HEAD, COLUMNS, WIDTH,
        )  # fmt: skip
        value_source = describe(
            value, batch, key_head, key_length,
            stride_value_batch, stride_value_head, stride_value_row, HEAD, COLUMNS, WIDTH,
        )  # fmt: skip
    else:
        query_source = query
        key_source = key
        value_source = value
    query_tile = load_tile(
        query_source, batch, head, start, query_length, stride_query_batch, stride_query_head,
        stride_query_row,
        ROWS, HEAD, WIDTH, DESCRIPTORS, True,
    )  # fmt: skip
    if MASK != 0:
        mask += tl.cast(batch, tl.int64) * stride_mask_batch + tl.cast(head, tl.int64) * stride_mask_head

    first, inner_first, inner_last, last = key_ranges(
        start, key_length, window, ROWS, COLUMNS, CAUSAL, WINDOW
    )
    accumulator = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for step in tl.static_range(
        3
    ):  # 0 the window's edge (or everything), 1 no edge, 2 the diagonal and the end
        if step == 0:
            begin = first
            end = inner_first if SPLIT else last
        elif step == 1:
            begin = inner_first
            end = inner_last
        else:
            begin = inner_last
            end = last
        if (step == 0 and (WINDOW or not SPLIT)) or (SPLIT and (step == 1 or (step == 2 and EDGE))):
            accumulator, total, largest = _attend(
                accumulator, total, largest, query_tile, key_source, value_source, mask, begin, end,
                batch, head, key_head, start, scale, query_length, key_length, window, seed, threshold,
                stride_key_batch, stride_key_head, stride_key_row,
                stride_value_batch, stride_value_head, stride_value_row,
                stride_mask_row, batch * heads + head,
                HEAD, WIDTH, ROWS, COLUMNS, CAUSAL, WINDOW, MASK, DROPOUT,
                DESCRIPTORS, EDGE and step != 1, SPECIALIZED, PRECISION, NATURAL,
            )  # fmt: skip

    seen = total > 0.0
    accumulator = accumulator * (keep_scale / tl.where(seen, total, 1.0))[:, None]
    store_tile(
        output, accumulator, batch, head, start, query_length,
        stride_output_batch, stride_output_head, stride_output_row, ROWS, HEAD, WIDTH,
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    places = log_sum_exp + (batch * heads + head).to(tl.int64) * query_length + rows
    if NATURAL:
        exponent = largest + tl.log(tl.where(seen, total, 1.0))
    else:
        exponent = (largest + tl.log2(tl.where(seen, total, 1.0))) * LN_2
    exponent = tl.where(seen, exponent, float("-inf"))
    tl.store(places, exponent, mask=rows < query_length)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    seed: int,
    is_causal: bool,
    scale: float,
    window: int,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log_sum_exp) of softmax(scale query key^T + mask) value.

    query: (batch, heads, length, dim); key, value: (batch, key heads, keys, dim), key heads a divisor of
    heads, dim at most 256. mask: bool (true: seen) or added, broadcastable to (batch, heads, length, keys).
    window: query i sees the keys i - window + 1 to i; 0 for none. log_sum_exp: (batch, heads, length)
    float32, natural logarithm before dropout, -inf for a query that sees no key, whose output is zeros.
    tile: another than ``configuration``'s, to compare them.
    """
    if scale < 0:  # the kernel takes the largest score before it scales
        return attention(-query, key, value, mask, dropout_p, seed, is_causal, -scale, window, tile)
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    output = torch.empty_like(query)
    log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
    if not output.numel() or not keys:
        return output.zero_(), log_sum_exp.fill_(float("-inf"))
    split = mask is None and dropout_p == 0
    tile = tile or tile_for("forward", not split, query, key, value)
    sources, descriptors = handed((query, key, value), (tile.rows, tile.columns, tile.columns), tile)
    mask_source, mask_strides, mask_kind = broadcast_mask(mask, query, key)
    causal = is_causal or window > 0
    specialized = tile.specialized and descriptors == "device"
    attention_kernel[(triton.cdiv(length, tile.rows) * heads * batch,)](
        *sources, mask_source, output, log_sum_exp, score_scale(scale, query),
        *dropout_numbers(dropout_p, seed), heads, heads // key.shape[1], length, keys, window,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, *output.stride()[:3],
        HEAD=dim, WIDTH=padded(dim), ROWS=tile.rows, COLUMNS=tile.columns,
        CAUSAL=causal, WINDOW=window > 0, MASK=mask_kind, DROPOUT=dropout_p > 0,
        EDGE=causal or keys % tile.columns != 0, SPLIT=split and not specialized, DESCRIPTORS=descriptors,
        SPECIALIZED=specialized, PRECISION=tile.precision, NATURAL=natural(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, log_sum_exp
