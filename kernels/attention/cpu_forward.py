"""Attention forward on the CPU: FlashAttention-2's tiles on the micro-kernel of ``kernels.tiles``.

A chunk of work is ``QUERIES`` queries of one head. It walks over the keys in tiles of ``KEYS``: scores from
the packed transpose of the keys, the online softmax row by row, then the weights times the values, all in
L1 and L2. Keys are packed once for all queries. Tiles beyond the diagonal, the window or the last key are
skipped, at the granularity of six queries and one vector of keys.

Everything is float32 in here; 16-bit tensors are widened on the way in and rounded once on the way out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kernels.attention.cpu_rows import (
    NONE,
    copy_rows,
    drop,
    fill,
    finish_row,
    first_key,
    group_keys,
    last_key,
    mask_arguments,
    mask_place,
    mask_row,
    online_softmax,
    threshold_of,
    up,
)
from kernels.compiled_once import address, aligned, keep_alive
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, multiply, pack_transposed

f32 = np.float32
QUERIES = 8 * ROWS
KEYS = 4 * PANEL


@chunked
def _pack(chunk, source, packed):
    """source (batch, heads, keys, dim) -> packed (batch, heads, panels, dim, PANEL), the last keys zeros."""
    keys, dim = source.shape[2:]
    panels = packed.shape[2]
    head, panel = chunk // panels, chunk % panels
    first = panel * PANEL
    pack_transposed(
        address(packed, chunk * dim * PANEL),
        address(source, (head * keys + first) * dim),
        min(PANEL, keys - first),
        dim,
    )


@chunked
def _forward(
    chunk,
    query,
    packed,
    value,
    kind,
    mask_bytes,
    mask,
    out,
    log_sum_exp,
    threshold,
    seed,
    causal,
    scale,
    window,
):
    _, heads, length, dim = query.shape
    kv_heads, keys, wide = value.shape[1], value.shape[2], value.shape[3]
    blocks = (length + QUERIES - 1) // QUERIES
    batch, head, block = chunk // blocks // heads, chunk // blocks % heads, blocks - 1 - chunk % blocks
    kv_head = batch * kv_heads + head // (heads // kv_heads)
    start = block * QUERIES
    count = min(QUERIES, length - start)
    row_at = (batch * heads + head) * length + start
    mask_at, mask_row_bytes = mask_place(mask.shape, batch, head, start)

    scratch = np.empty(QUERIES * (KEYS + wide + dim + 2) + LANES, np.float32)
    scores = aligned(scratch)
    sums = address(scores, QUERIES * KEYS)
    totals = address(sums, QUERIES * wide)
    tops = address(totals, QUERIES)
    rows = address(tops, QUERIES)
    fill(sums, QUERIES * (wide + 1), f32(0))  # and the totals behind them
    fill(tops, QUERIES, f32(-np.inf))
    copy_rows(rows, address(query, row_at * dim), QUERIES, count, dim, dim, f32(scale))

    first_of_all = first_key(start, window) // PANEL * PANEL
    last_of_all = last_key(start + count - 1, keys, causal, window)
    for tile in range(first_of_all, last_of_all, KEYS):
        tile_end = min(tile + KEYS, last_of_all)
        for panel in range(tile, tile_end, PANEL):
            panel_at = (kv_head * packed.shape[2] + panel // PANEL) * dim * PANEL
            for r in range(0, count, ROWS):
                first, last = group_keys(start, r, count, tile, tile_end, keys, causal, window)
                if first < panel + PANEL and last > panel:
                    multiply(
                        address(scores, r * KEYS + panel - tile),
                        KEYS,
                        address(rows, r * dim),
                        dim,
                        1,
                        address(packed, panel_at),
                        PANEL,
                        0,
                        dim,
                        (min(PANEL, last - panel) + LANES - 1) // LANES,
                        True,
                    )
        for r in range(count):
            first, last = group_keys(start, r // ROWS * ROWS, count, tile, tile_end, keys, causal, window)
            if first >= last:
                continue
            own_first = min(last, max(first, first_key(start + r, window)))
            own_last = max(own_first, min(last, last_key(start + r, keys, causal, window)))
            own, own_count = r * KEYS + own_first - tile, own_last - own_first
            left = r * KEYS + (first - tile) // LANES * LANES  # whole vectors, -inf where nothing is seen
            right = r * KEYS + (last - tile + LANES - 1) // LANES * LANES
            fill(address(scores, left), own - left, f32(-np.inf))
            fill(address(scores, own + own_count), right - own - own_count, f32(-np.inf))
            if kind != NONE:
                place = mask_at + r * mask_row_bytes + own_first * mask_bytes
                mask_row(address(scores, own), own_count, kind, address(mask, place))
            online_softmax(
                address(scores, left),
                right - left,
                address(tops, r),
                address(totals, r),
                address(sums, r * wide),
                wide,
            )
            if threshold > 0:
                drop(address(scores, own), own_count, own_first, seed, row_at + r, threshold)
        for r in range(0, count, ROWS):
            first, last = group_keys(start, r, count, tile, tile_end, keys, causal, window)
            if first < last:
                multiply(
                    address(sums, r * wide),
                    wide,
                    address(scores, r * KEYS + first - tile),
                    KEYS,
                    1,
                    address(value, (kv_head * keys + first) * wide),
                    wide,
                    PANEL,
                    last - first,
                    wide // LANES,
                    False,
                )
    keep = f32(1.0 / (1.0 - threshold / 4294967296.0))
    for r in range(count):
        finish_row(
            address(out, (row_at + r) * dim),
            address(sums, r * wide),
            dim,
            address(tops, r),
            address(totals, r),
            address(log_sum_exp, row_at + r),
            keep,
        )
    keep_alive(scratch)


def packed_transpose(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, keys, dim) float32 -> (batch, heads, panels, dim, PANEL), as ``multiply`` reads B."""
    batch, heads, keys, dim = tensor.shape
    packed = tensor.new_empty(batch, heads, -(-keys // PANEL), dim, PANEL)
    _pack(batch * heads * packed.shape[2], tensor, packed)
    return packed


def whole_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """float32, the last dimension filled up with zeros to a multiple of ``LANES``."""
    tensor = tensor.float()
    missing = up(tensor.shape[-1]) - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, natural log of the sum of exponentials); see ``kernels.attention`` for the shapes."""
    batch, heads, length, _ = query.shape
    out = torch.empty_like(query, dtype=torch.float32)
    log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
    _forward(
        batch * heads * -(-length // QUERIES),
        query.float(),
        packed_transpose(key.float()),
        whole_vectors(value),
        *mask_arguments(mask),
        out,
        log_sum_exp,
        threshold_of(dropout_p),
        seed,
        is_causal,
        scale,
        window,
    )
    return out.to(query.dtype), log_sum_exp
