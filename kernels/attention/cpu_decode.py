"""One query a sequence against a paged cache, on the CPU (Kwon et al. 2023, "PagedAttention", section 4.1).

A chunk of work is one key-value head of one sequence: all queries of its group share what is read, once, page
by page, in tiles of ``PANEL`` keys. Where sequences and heads are few, the keys are cut into parts whose results
are put together afterwards (Dao et al. 2023, "Flash-Decoding"); how many depends on the sizes alone.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.attention.cpu_rows import exponential, exponentials, fill, row_maximum, scale_by, up
from kernels.simd import full_width
from kernels.storage import narrow, widen
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, address, multiply, pack_transposed

f32, u64 = np.float32, np.uint64
LEAST_CHUNKS = 16
LEAST_KEYS = 256
"""Keys that a part has at least."""


@chunked
def _check(chunk, block_table, context_lengths, blocks, block_size, found):
    """found: (1, sequence) where a length does not fit its table, (2, sequence) where a block does not exist."""
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


@chunked
def _decode(
    chunk, query, key_cache, value_cache, block_table, context_lengths, scale, out, partial, tops, totals
):
    """out: where there is one part, the result; else partial, tops and totals receive each part's."""
    full_width()
    _, heads, dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    parts = tops.shape[2]
    sequence, kv_head, part = chunk // parts // kv_heads, chunk // parts % kv_heads, chunk % parts
    group = heads // kv_heads
    rows = (group + ROWS - 1) // ROWS * ROWS
    wide = (dim + LANES - 1) // LANES * LANES

    size = rows * (dim + wide + PANEL) + PANEL * (2 * dim + wide)
    scratch = np.empty(size + LANES, np.float32)
    skip = (-address(scratch, 0) % (4 * LANES)) // 4
    values = scratch[skip : skip + PANEL * wide]
    packed = scratch[skip + PANEL * wide : skip + PANEL * (wide + dim)]
    keys = scratch[skip + PANEL * (wide + dim) : skip + PANEL * (wide + 2 * dim)]
    skip += PANEL * (wide + 2 * dim)
    scores = scratch[skip : skip + rows * PANEL]
    sums = scratch[skip + rows * PANEL : skip + rows * (PANEL + wide)]
    queries = scratch[skip + rows * (PANEL + wide) : skip + rows * (PANEL + wide + dim)]
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    fill(values, 0, PANEL * wide, f32(0))
    fill(sums, 0, rows * wide, f32(0))
    for r in range(rows):
        top[r], total[r] = f32(-np.inf), f32(0)
        for d in range(dim):
            queries[r * dim + d] = (
                widen(query[sequence, kv_head * group + r, d]) * f32(scale) if r < group else f32(0)
            )

    length = context_lengths[sequence]
    share = (block_table.shape[1] * block_size + parts - 1) // parts
    share = (share + PANEL - 1) // PANEL * PANEL
    end = min(length, (part + 1) * share)
    for tile in range(part * share, end, PANEL):
        count = min(PANEL, end - tile)
        for place in range(count):
            block = block_table[sequence, (tile + place) // block_size]
            within = (tile + place) % block_size
            for d in range(dim):
                keys[u64(place * dim) + u64(d)] = widen(key_cache[block, within, kv_head, d])
            for d in range(dim):
                values[u64(place * wide) + u64(d)] = widen(value_cache[block, within, kv_head, d])
        pack_transposed(packed, keys, 0, count, dim)
        vectors = (count + LANES - 1) // LANES
        for r in range(0, rows, ROWS):
            multiply(
                address(scores, r * PANEL),
                PANEL,
                address(queries, r * dim),
                dim,
                1,
                address(packed, 0),
                PANEL,
                0,
                dim,
                vectors,
                True,
            )
        for r in range(group):
            fill(scores, r * PANEL + count, vectors * LANES - count, f32(-np.inf))
            highest = row_maximum(scores, r * PANEL, vectors * LANES, top[r])
            base = f32(0) if highest == f32(-np.inf) else highest
            shrink = exponential(top[r] - base)
            total[r] = total[r] * shrink + exponentials(scores, r * PANEL, vectors * LANES, base)
            if highest != top[r]:
                scale_by(sums, r * wide, wide, shrink)
                top[r] = highest
        for r in range(0, rows, ROWS):
            multiply(
                address(sums, r * wide),
                wide,
                address(scores, r * PANEL),
                PANEL,
                1,
                address(values, 0),
                wide,
                PANEL,
                count,
                wide // LANES,
                False,
            )
    for r in range(group):
        head = kv_head * group + r
        if parts > 1:
            tops[sequence, head, part], totals[sequence, head, part] = top[r], total[r]
            for d in range(dim):
                partial[sequence, head, part, d] = sums[r * wide + d]
        else:
            factor = f32(0) if total[r] == f32(0) else f32(1) / total[r]
            for d in range(dim):
                out[sequence, head, d] = narrow(sums[r * wide + d] * factor, out)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See ``kernels.decode_attention``. ValueError: a length beyond its table, a block that does not exist."""
    sequences, heads, dim = query.shape
    blocks, block_size, kv_heads, _ = key_cache.shape
    found = torch.zeros(2, dtype=torch.int64)
    _check(1, block_table, context_lengths, blocks, block_size, found)
    wrong, sequence = found.tolist()
    if wrong == 1:
        raise ValueError(
            f"context_lengths[{sequence}] is {int(context_lengths[sequence])}; its row of block_table has place "
            f"for 0 to {block_table.shape[1] * block_size} keys"
        )
    if wrong == 2:
        raise ValueError(
            f"block_table[{sequence}] names a block that the cache does not have: of those that its "
            f"{int(context_lengths[sequence])} keys need, all must lie between 0 and {blocks - 1}"
        )
    out = torch.empty_like(query)
    most = block_table.shape[1] * block_size
    parts = max(1, min(-(-most // LEAST_KEYS), -(-LEAST_CHUNKS // max(1, sequences * kv_heads))))
    if parts > 1:
        partial = query.new_empty(sequences, heads, parts, dim, dtype=torch.float32)
        tops, totals = query.new_empty(2, sequences, heads, parts, dtype=torch.float32)
    else:
        partial, tops = (
            query.new_empty(1, 1, 1, 1, dtype=torch.float32),
            query.new_empty(1, 1, 1, dtype=torch.float32),
        )
        totals = tops
    arguments = (
        query,
        key_cache,
        value_cache,
        block_table,
        context_lengths,
        scale,
        out,
        partial,
        tops,
        totals,
    )
    _decode(sequences * kv_heads * parts, *arguments)
    if parts == 1:
        return out
    weights = (tops - tops.amax(-1, keepdim=True)).exp().nan_to_num(0.0)  # -inf - -inf: no key at all
    total = (weights * totals).sum(-1, keepdim=True)
    summed = torch.linalg.vecdot(weights[..., None], partial, dim=2)
    return torch.where(total > 0, summed / total, 0.0).to(query.dtype)
