"""Attention forward on the CPU: FlashAttention-2's tiles on the micro-kernel of ``kernels.tiles``.

A chunk of work is ``QUERIES`` queries of one head. It walks over the keys in tiles of ``KEYS``: scores from the
packed transpose of the keys, the online softmax row by row, then the weights times the values, all in L1 and
L2. Keys are packed once for all queries. Tiles beyond the diagonal, the window or the last key are skipped, at
the granularity of six queries and one vector of keys.

Everything is float32 in here; 16-bit tensors are widened on the way in and rounded once on the way out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kernels.attention.cpu_rows import (
    ADDED,
    SEEN,
    add_mask,
    drop,
    exponential,
    exponentials,
    fill,
    first_key,
    group_keys,
    hide,
    last_key,
    mask_arguments,
    mask_place,
    row_maximum,
    row_seed,
    scale_by,
    threshold_of,
    up,
)
from kernels.simd import full_width, log_float32
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, address, multiply, pack_transposed

f32 = np.float32
QUERIES = 8 * ROWS
KEYS = 4 * PANEL


@chunked
def _pack(chunk, source, packed):
    """source (batch, heads, keys, dim) -> packed (batch, heads, panels, dim, PANEL), the last keys zeros."""
    _, heads, keys, dim = source.shape
    panels = packed.shape[2]
    head, panel = chunk // panels, chunk % panels
    first = panel * PANEL
    pack_transposed(
        packed[head // heads, head % heads, panel].reshape(-1),
        source,
        (head * keys + first) * dim,
        min(PANEL, keys - first),
        dim,
    )


@chunked
def _forward(
    chunk, query, packed, value, kind, added, seen, out, log_sum_exp, threshold, seed, causal, scale, window
):
    full_width()
    _, heads, length, dim = query.shape
    kv_heads, keys, wide = value.shape[1], value.shape[2], value.shape[3]
    blocks = (length + QUERIES - 1) // QUERIES
    batch, head, block = chunk // blocks // heads, chunk // blocks % heads, blocks - 1 - chunk % blocks
    kv_head = batch * kv_heads + head // (heads // kv_heads)
    start = block * QUERIES
    count = min(QUERIES, length - start)
    row_at = (batch * heads + head) * length + start

    scratch = np.empty(QUERIES * (KEYS + wide + dim) + LANES, np.float32)
    skip = (-address(scratch, 0) % (4 * LANES)) // 4
    scores = scratch[skip : skip + QUERIES * KEYS]
    total_out = scratch[skip + QUERIES * KEYS : skip + QUERIES * (KEYS + wide)]
    rows = scratch[skip + QUERIES * (KEYS + wide) : skip + QUERIES * (KEYS + wide + dim)]
    tops, totals = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)

    factor = f32(scale)
    for r in range(QUERIES):
        tops[r], totals[r] = f32(-np.inf), f32(0)
        for d in range(dim):
            rows[r * dim + d] = query[batch, head, start + r, d] * factor if r < count else f32(0)
    fill(total_out, 0, QUERIES * wide, f32(0))

    added_at, added_row = mask_place(added.shape, batch, head, start)
    added_flat, seen_flat = added.reshape(-1), seen.reshape(-1)
    seen_at, seen_row = mask_place(seen.shape, batch, head, start)
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
            fill(scores, left, own - left, f32(-np.inf))
            fill(scores, own + own_count, right - own - own_count, f32(-np.inf))
            if kind == ADDED:
                add_mask(scores, own, added_flat, added_at + r * added_row + own_first, own_count)
            elif kind == SEEN:
                hide(scores, own, seen_flat, seen_at + r * seen_row + own_first, own_count)
            top = row_maximum(scores, left, right - left, tops[r])
            base = f32(0) if top == f32(-np.inf) else top
            shrink = exponential(tops[r] - base)
            totals[r] = totals[r] * shrink + exponentials(scores, left, right - left, base)
            if threshold > 0:
                drop(scores, own, own_first, own_count, row_seed(seed, row_at + r), np.uint32(threshold))
            if top != tops[r]:
                scale_by(total_out, r * wide, wide, shrink)
                tops[r] = top
        for r in range(0, count, ROWS):
            first, last = group_keys(start, r, count, tile, tile_end, keys, causal, window)
            if first < last:
                multiply(
                    address(total_out, r * wide),
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
        total = totals[r]
        share = keep / total if total > f32(0) else f32(0)
        if total != total:
            share = total
        for d in range(dim):
            out[batch, head, start + r, d] = total_out[r * wide + d] * share
        log_sum_exp[batch, head, start + r] = tops[r] + log_float32(total)


def packed_transpose(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, keys, dim) float32 -> (batch, heads, panels, dim, PANEL): what ``multiply`` reads as B."""
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
