"""Attention backward on the CPU: the scores once more from the log-sum-exp, five products on tiles.

A chunk of work is a range of keys of one key-value head. It holds the gradients of ``TILE`` keys and values in
cache and walks over all queries that see them (Dao et al. 2022, algorithm 4). The query's gradient is a sum over
ranges of keys: each range adds to a copy of its own, and the copies are added in order, so that no thread
waits and the result is always the same. How many ranges there are depends on the sizes alone.

With P the weights and dP = dO V^T: dV = P^T dO, dS = P (dP - sum(dO O)), dQ = dS K, dK = dS^T Q.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.attention.cpu_forward import QUERIES, packed_transpose, whole_vectors
from kernels.attention.cpu_rows import (
    ADDED,
    SEEN,
    add_mask,
    drop,
    fill,
    first_key,
    group_keys,
    hide,
    last_key,
    mask_arguments,
    mask_place,
    row_seed,
    slopes_of,
    threshold_of,
)
from kernels.simd import full_width
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, address, multiply

f32 = np.float32
TILE = 192
"""Keys of one tile: whole panels, and whole groups of ROWS."""
LEAST_CHUNKS = 24


@chunked
def _backward(
    chunk,
    query,
    grad,
    key,
    packed_key,
    packed_value,
    kind,
    added,
    seen,
    log_sum_exp,
    delta,
    grad_query,
    grad_key,
    grad_value,
    threshold,
    seed,
    causal,
    scale,
    window,
):
    full_width()
    _, heads, length, dim = query.shape
    _, kv_heads, keys, wide = key.shape
    parts = grad_query.shape[2]
    batch, kv_head, part = chunk // parts // kv_heads, chunk // parts % kv_heads, chunk % parts
    pack_at = (batch * kv_heads + kv_head) * packed_key.shape[2]
    group = heads // kv_heads

    scratch = np.empty(2 * (QUERIES * (TILE + wide) + TILE * wide) + LANES, np.float32)
    skip = (-address(scratch, 0) % (4 * LANES)) // 4
    scores = scratch[skip : skip + QUERIES * TILE]
    slopes = scratch[skip + QUERIES * TILE : skip + 2 * QUERIES * TILE]
    skip += 2 * QUERIES * TILE
    rows = scratch[skip : skip + QUERIES * wide]
    grads = scratch[skip + QUERIES * wide : skip + 2 * QUERIES * wide]
    skip += 2 * QUERIES * wide
    key_sums = scratch[skip : skip + TILE * wide]
    value_sums = scratch[skip + TILE * wide : skip + 2 * TILE * wide]
    fill(rows, 0, 2 * QUERIES * wide, f32(0))

    factor = f32(scale)
    keep = f32(1.0 / (1.0 - threshold / 4294967296.0))
    added_flat, seen_flat = added.reshape(-1), seen.reshape(-1)
    tiles = (keys + TILE - 1) // TILE
    for tile in range(tiles * part // parts * TILE, tiles * (part + 1) // parts * TILE, TILE):
        tile_end = min(tile + TILE, keys)
        fill(key_sums, 0, 2 * TILE * wide, f32(0))
        query_end = min(length, tile_end - 1 + window) if window > 0 else length
        for step in range(group):
            head = kv_head * group + step
            for start in range(tile // QUERIES * QUERIES if causal else 0, query_end, QUERIES):
                count = min(QUERIES, length - start)
                for r in range(QUERIES):
                    for d in range(dim):
                        rows[r * wide + d] = (
                            query[batch, head, start + r, d] * factor if r < count else f32(0)
                        )
                        grads[r * wide + d] = grad[batch, head, start + r, d] if r < count else f32(0)
                for panel in range(tile, tile_end, PANEL):
                    panel_at = (pack_at + panel // PANEL) * dim * PANEL
                    for r in range(0, count, ROWS):
                        first, last = group_keys(start, r, count, tile, tile_end, keys, causal, window)
                        if first < panel + PANEL and last > panel:
                            vectors = (min(PANEL, last - panel) + LANES - 1) // LANES
                            place = r * TILE + panel - tile
                            multiply(
                                address(scores, place),
                                TILE,
                                address(rows, r * wide),
                                wide,
                                1,
                                address(packed_key, panel_at),
                                PANEL,
                                0,
                                dim,
                                vectors,
                                True,
                            )
                            multiply(
                                address(slopes, place),
                                TILE,
                                address(grads, r * wide),
                                wide,
                                1,
                                address(packed_value, panel_at),
                                PANEL,
                                0,
                                dim,
                                vectors,
                                True,
                            )
                added_at, added_row = mask_place(added.shape, batch, head, start)
                seen_at, seen_row = mask_place(seen.shape, batch, head, start)
                for r in range(count):
                    first, last = group_keys(
                        start, r // ROWS * ROWS, count, tile, tile_end, keys, causal, window
                    )
                    own_first = min(tile_end, max(tile, first_key(start + r, window)))
                    own_last = max(own_first, min(tile_end, last_key(start + r, keys, causal, window)))
                    own, own_count = r * TILE + own_first - tile, own_last - own_first
                    before, after = own_first - tile, tile + TILE - own_last
                    if kind == ADDED:
                        add_mask(scores, own, added_flat, added_at + r * added_row + own_first, own_count)
                    elif kind == SEEN:
                        hide(scores, own, seen_flat, seen_at + r * seen_row + own_first, own_count)
                    row = row_seed(seed, (batch * heads + head) * length + start + r)
                    if threshold > 0:
                        drop(slopes, own, own_first, own_count, row, np.uint32(threshold))
                    base = log_sum_exp[batch, head, start + r]
                    base = f32(np.inf) if base == f32(-np.inf) else base
                    slopes_of(scores, slopes, own, own_count, base, keep, delta[batch, head, start + r])
                    if threshold > 0:
                        drop(scores, own, own_first, own_count, row, np.uint32(threshold))
                    for values in (scores, slopes):
                        fill(values, r * TILE, before, f32(0))
                        fill(values, own + own_count, after, f32(0))
                for place in range(0, tile_end - tile, ROWS):
                    first_row = max(0, tile + place - start) if causal else 0
                    last_row = min(count, tile + place + ROWS - 1 + window - start) if window > 0 else count
                    if first_row < last_row:
                        weights_at = first_row * TILE + place
                        multiply(
                            address(value_sums, place * wide),
                            wide,
                            address(scores, weights_at),
                            1,
                            TILE,
                            address(grads, first_row * wide),
                            wide,
                            PANEL,
                            last_row - first_row,
                            wide // LANES,
                            False,
                        )
                        multiply(
                            address(key_sums, place * wide),
                            wide,
                            address(slopes, weights_at),
                            1,
                            TILE,
                            address(rows, first_row * wide),
                            wide,
                            PANEL,
                            last_row - first_row,
                            wide // LANES,
                            False,
                        )
                query_at = ((batch * heads + head) * parts + part) * grad_query.shape[3] + start
                for r in range(0, count, ROWS):
                    first, last = group_keys(start, r, count, tile, tile_end, keys, causal, window)
                    if first < last:
                        multiply(
                            address(grad_query, (query_at + r) * wide),
                            wide,
                            address(slopes, r * TILE + first - tile),
                            TILE,
                            1,
                            address(key, ((batch * kv_heads + kv_head) * keys + first) * wide),
                            wide,
                            PANEL,
                            last - first,
                            wide // LANES,
                            False,
                        )
        for place in range(tile_end - tile):
            for d in range(dim):
                # Dropout's 1 / (1 - p) is left to the end.
                grad_key[batch, kv_head, tile + place, d] = key_sums[place * wide + d]
                grad_value[batch, kv_head, tile + place, d] = value_sums[place * wide + d] * keep


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; see ``kernels.attention`` for the shapes."""
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide_grad, key_rows = grad.float(), whole_vectors(key)
    delta = torch.linalg.vecdot(wide_grad, output.float())
    parts = max(1, min(-(-keys // TILE), -(-LEAST_CHUNKS // (batch * kv_heads))))
    padded = -(-length // QUERIES) * QUERIES
    grad_query = grad.new_zeros(batch, heads, parts, padded, key_rows.shape[3], dtype=torch.float32)
    grad_key, grad_value = (torch.empty_like(key, dtype=torch.float32) for _ in range(2))
    _backward(
        batch * kv_heads * parts,
        query.float(),
        wide_grad,
        key_rows,
        packed_transpose(key.float()),
        packed_transpose(value.float()),
        *mask_arguments(mask),
        log_sum_exp,
        delta,
        grad_query,
        grad_key,
        grad_value,
        threshold_of(dropout_p),
        seed,
        is_causal,
        scale,
        window,
    )
    whole = grad_query[:, :, 0] if parts == 1 else grad_query.sum(2)
    return (
        (whole[:, :, :length, :dim] * scale).to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
    )
