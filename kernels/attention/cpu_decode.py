"""One query a sequence against a paged cache, on the CPU (Kwon et al. 2023, "PagedAttention", section 4.1).

A chunk of work is one key-value head of one sequence: all queries of its group share what is read, once,
page by page, in tiles of ``PANEL`` keys. Where whole vectors of keys lie in a page, float32 is read where it
lies; else rows are brought together first. Where sequences and heads are few, the keys are cut into parts
whose results are put together afterwards (Dao et al. 2023, "Flash-Decoding"); how many depends on the sizes
alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from kernels.attention.cpu_rows import copy_rows, fill, finish_row, online_softmax
from kernels.compiled_once import (
    address,
    aligned,
    bfloats_at,
    compiled_once,
    floats_at,
    halves_at,
    keep_alive,
)
from kernels.simd import full_width
from kernels.storage import widen
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, multiply, pack_transposed, transpose_rows

f32 = np.float32
_inline = njit(error_model="numpy", forceinline=True)
STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""How a cache stores its elements, for ``widen_row``."""
LEAST_CHUNKS = 16
LEAST_KEYS = 256
"""Keys that a part has at least."""


@chunked
def _check(chunk, block_table, context_lengths, blocks, block_size, found):
    """found: (1, sequence) where a length does not fit its table, (2, sequence) where a block is missing."""
    sequences, most = block_table.shape
    for sequence in range(sequences):
        length = context_lengths[sequence]
        if length < 0 or length > most * block_size:
            found[0], found[1] = 1, sequence
            return
        for place in range((length + block_size - 1) // block_size):
            if block_table[sequence, place] < 0 or block_table[sequence, place] >= blocks:
                found[0], found[1] = 2, sequence
                return


@compiled_once()
def widen_row(target, source, count, stored):
    """``count`` elements of a cache as float32."""
    full_width()
    out = floats_at(target, count)
    if stored == 0:
        floats = floats_at(source, count)
        for i in range(count):
            out[i] = floats[i]
    elif stored == 1:
        halves = halves_at(source, count)
        for i in range(count):
            out[i] = widen(halves[i])
    else:
        bfloats = bfloats_at(source, count)
        for i in range(count):
            out[i] = widen(bfloats[i])


@_inline
def _place(block_table, sequence, key, block_size, kv_heads, kv_head):
    """Which row of the cache a key of a sequence is, counted over all blocks, keys and heads."""
    block = np.int64(block_table[sequence, key // block_size])
    return (block * block_size + key % block_size) * kv_heads + kv_head


@chunked
def _decode(
    chunk,
    query,
    key_cache,
    value_cache,
    stored,
    block_table,
    context_lengths,
    scale,
    out,
    log_sum_exp,
):
    """Caches as bytes. out, log_sum_exp: (sequences, heads, parts, dim) and (sequences, heads, parts)."""
    _, heads, dim = query.shape
    _, block_size, kv_heads, row_bytes = key_cache.shape
    parts = out.shape[2]
    sequence, kv_head, part = chunk // parts // kv_heads, chunk // parts % kv_heads, chunk % parts
    group = heads // kv_heads
    rows = (group + ROWS - 1) // ROWS * ROWS
    wide = (dim + LANES - 1) // LANES * LANES
    # Whole vectors only: a further one would reach behind a row, or a page.
    where_it_lies = stored == 0 and dim == wide and block_size % LANES == 0

    scratch = np.empty(PANEL * (2 * dim + wide) + rows * (PANEL + dim + wide + 2) + LANES, np.float32)
    values = aligned(scratch)
    packed = address(values, PANEL * wide)
    keys = address(packed, PANEL * dim)
    scores = address(keys, PANEL * dim)
    sums = address(scores, rows * PANEL)
    totals = address(sums, rows * wide)
    tops = address(totals, rows)
    queries = address(tops, rows)
    if not where_it_lies:
        fill(values, PANEL * wide, f32(0))  # behind a row's numbers
    fill(sums, rows * (wide + 1), f32(0))  # and the totals behind them
    fill(tops, rows, f32(-np.inf))
    first_query = sequence * heads + kv_head * group
    copy_rows(queries, address(query, first_query * dim), rows, group, dim, dim, f32(scale))

    length = context_lengths[sequence]
    share = (block_table.shape[1] * block_size + parts - 1) // parts
    share = (share + PANEL - 1) // PANEL * PANEL
    end = min(length, (part + 1) * share)
    for tile in range(part * share, end, PANEL):
        count = min(PANEL, end - tile)
        if where_it_lies:
            for place in range(0, count, LANES):
                row = _place(block_table, sequence, tile + place, block_size, kv_heads, kv_head)
                transpose_rows(packed + 4 * place, address(key_cache, row * row_bytes), kv_heads * dim, dim)
        else:
            for place in range(count):
                row = _place(block_table, sequence, tile + place, block_size, kv_heads, kv_head)
                widen_row(address(keys, place * dim), address(key_cache, row * row_bytes), dim, stored)
                widen_row(address(values, place * wide), address(value_cache, row * row_bytes), dim, stored)
            pack_transposed(packed, keys, count, dim)
        vectors = (count + LANES - 1) // LANES
        for r in range(0, rows, ROWS):
            multiply(
                address(scores, r * PANEL),
                PANEL,
                address(queries, r * dim),
                dim,
                1,
                packed,
                PANEL,
                0,
                dim,
                vectors,
                True,
            )
        for r in range(group):
            fill(address(scores, r * PANEL + count), vectors * LANES - count, f32(-np.inf))
            online_softmax(
                address(scores, r * PANEL),
                vectors * LANES,
                address(tops, r),
                address(totals, r),
                address(sums, r * wide),
                wide,
            )
        place = 0
        while place < count:
            run, source, step = count, values, wide
            if where_it_lies:  # to the end of the page
                row = _place(block_table, sequence, tile + place, block_size, kv_heads, kv_head)
                run = min(count - place, block_size - (tile + place) % block_size)
                source, step = address(value_cache, row * row_bytes), kv_heads * dim
            for r in range(0, rows, ROWS):
                multiply(
                    address(sums, r * wide),
                    wide,
                    address(scores, r * PANEL + place),
                    PANEL,
                    1,
                    source,
                    step,
                    PANEL,
                    run,
                    wide // LANES,
                    False,
                )
            place += run
    for r in range(group):
        at = (first_query + r) * parts + part
        finish_row(
            address(out, at * dim),
            address(sums, r * wide),
            dim,
            address(tops, r),
            address(totals, r),
            address(log_sum_exp, at),
            f32(1),
        )
    keep_alive(scratch)


def check_tables(
    block_table: torch.Tensor, context_lengths: torch.Tensor, blocks: int, block_size: int
) -> None:
    """ValueError: a length for which its row has no place, a block that the cache does not have."""
    found = torch.zeros(2, dtype=torch.int64)
    _check(1, block_table.contiguous(), context_lengths.contiguous(), blocks, block_size, found)
    wrong, sequence = found.tolist()
    if wrong == 1:
        raise ValueError(
            f"context_lengths[{sequence}] is {int(context_lengths[sequence])}; its row of block_table has "
            f"place for 0 to {block_table.shape[1] * block_size} keys"
        )
    if wrong == 2:
        raise ValueError(
            f"block_table[{sequence}] names a block that the cache does not have: of those that its "
            f"{int(context_lengths[sequence])} keys need, all must lie between 0 and {blocks - 1}"
        )


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See ``kernels.decode_attention``."""
    sequences, heads, dim = query.shape
    blocks, block_size, kv_heads, _ = key_cache.shape
    check_tables(block_table, context_lengths, blocks, block_size)
    most = block_table.shape[1] * block_size
    parts = max(1, min(-(-most // LEAST_KEYS), -(-LEAST_CHUNKS // max(1, sequences * kv_heads))))
    out = query.new_empty(sequences, heads, parts, dim, dtype=torch.float32)
    log_sum_exp = out.new_empty(sequences, heads, parts)
    _decode(
        sequences * kv_heads * parts,
        query.float(),
        key_cache.view(torch.uint8),
        value_cache.view(torch.uint8),
        STORED[key_cache.dtype],
        block_table,
        context_lengths,
        scale,
        out,
        log_sum_exp,
    )
    if parts > 1:
        weights = log_sum_exp.softmax(-1).nan_to_num(0.0)  # all -inf: there is no key
        out = torch.linalg.vecdot(weights[..., None], out, dim=2)
    return out.view(query.shape).to(query.dtype)
