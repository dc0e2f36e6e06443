"""One query a sequence against a paged cache: the context is split over programs, a second kernel combines.

Sources: Kwon et al. 2023 "PagedAttention" (the block table), Dao et al. 2023 "Flash-Decoding" (the split).
A decoding step reads every key and value once for few products, so what counts is that enough programs read
at the same time: one sequence and one key head alone would keep one multiprocessor busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.gpu_scores import LOG2_E
from kernels.attention.gpu_tiles import MULTIPROCESSORS, configuration, padded, target_of

LARGEST_SPLIT = 64
"""Parts of a context at most: the combining kernel holds that many sums at a time."""


@triton.jit(do_not_specialize=["max_blocks", "split_length"])
def split_kernel(
    query, key_cache, value_cache, block_table, context_lengths, partial, exponents, scale,
    blocks, block_size, max_blocks, heads, key_heads, split_length, splits,
    stride_block, stride_slot, stride_key_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of one key head against one part of the context.

    Writes softmax-weighted values (float32) to partial (sequences, heads, splits, HEAD), and the base-2
    logarithm of the weights' sum to exponents (sequences, heads, splits), -inf for a part without keys.
    GROUP: the queries that share a key head, padded to the 16 rows that matrix instructions take.
    """
    split = tl.program_id(0)
    key_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context = tl.minimum(tl.load(context_lengths + sequence), max_blocks * block_size)
    first = split * split_length
    last = tl.minimum(first + split_length, context)
    group = heads // key_heads
    member = tl.arange(0, GROUP)
    head = key_head * group + member
    column = tl.arange(0, WIDTH)
    inside = (member < group)[:, None] & (column < HEAD)[None, :]
    places = (sequence * heads + head)[:, None] * HEAD + column[None, :]
    query_tile = tl.load(query + places, mask=inside, other=0.0)

    accumulator = tl.zeros((GROUP, WIDTH), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    for place in tl.range(first, last, COLUMNS):
        position = place + tl.arange(0, COLUMNS)
        there = position < last
        block = tl.load(block_table + sequence * max_blocks + position // block_size, mask=there, other=0)
        there = there & (block >= 0) & (block < blocks)  # a wrong table reads nothing outside the cache
        slot = block.to(tl.int64) * stride_block + (position % block_size).to(tl.int64) * stride_slot
        cache = slot[:, None] + key_head.to(tl.int64) * stride_key_head + column[None, :]
        seen = there[:, None] & (column < HEAD)[None, :]
        key_tile = tl.load(key_cache + cache, mask=seen, other=0.0)
        value_tile = tl.load(value_cache + cache, mask=seen, other=0.0)
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(largest - shift)
        total = total * correction + tl.sum(weights, 1)
        largest = highest
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)

    some = total > 0.0
    sums = tl.where(some, total, 1.0)
    row = (sequence * heads + head) * splits + split
    tl.store(partial + row[:, None] * HEAD + column[None, :], accumulator / sums[:, None], mask=inside)
    exponent = tl.where(some, largest + tl.log2(sums), float("-inf"))
    tl.store(exponents + row, exponent, mask=member < group)


@triton.jit
def combine_kernel(
    partial, exponents, output, splits,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """output (sequences * heads, HEAD) = the parts weighted by their share; zeros without any key."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    exponent = tl.load(exponents + row * splits + split, mask=split < splits, other=float("-inf"))
    highest = tl.max(exponent, 0)
    weights = tl.exp2(exponent - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    inside = (split < splits)[:, None] & (column < HEAD)[None, :]
    places = (row * splits + split)[:, None] * HEAD + column[None, :]
    parts = tl.load(partial + places, mask=inside, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output + row * HEAD + column, result.to(output.dtype.element_ty), mask=column < HEAD)


def split_sizes(sequences: int, key_heads: int, keys: int, columns: int, target: str) -> tuple[int, int]:
    """(parts, keys a part) of contexts of up to ``keys``: two programs a multiprocessor, none below
    ``columns``.

    Depends on sizes only, never on the lengths in device memory, which to read would stop the stream.
    """
    wanted = 2 * MULTIPROCESSORS[target] // max(1, sequences * key_heads)
    parts = max(1, min(wanted, triton.cdiv(keys, columns), LARGEST_SPLIT))
    length = triton.cdiv(triton.cdiv(keys, parts), columns) * columns
    return triton.cdiv(keys, length), length


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As ``kernels.attention.decode_attention``, for contiguous tensors on a GPU (or in the interpreter)."""
    sequences, heads, dim = query.shape
    blocks, block_size, key_heads, _ = key_cache.shape
    max_blocks = block_table.shape[1]
    output = torch.empty_like(query)
    if not output.numel():
        return output
    if not blocks or not block_size or not max_blocks:
        return output.zero_()
    target = target_of(query)
    tile = configuration(dim, query.dtype, "decode", target)
    parts, length = split_sizes(sequences, key_heads, max_blocks * block_size, tile.columns, target)
    partial = query.new_empty((sequences, heads, parts, dim), dtype=torch.float32)
    exponents = query.new_empty((sequences, heads, parts), dtype=torch.float32)
    split_kernel[(parts, key_heads, sequences)](
        query, key_cache, value_cache, block_table, context_lengths, partial, exponents, scale * LOG2_E.value,
        blocks, block_size, max_blocks, heads, key_heads, length, parts, *key_cache.stride()[:3],
        HEAD=dim, WIDTH=padded(dim), GROUP=padded(heads // key_heads), COLUMNS=tile.columns,
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    combine_kernel[(sequences * heads,)](
        partial, exponents, output, parts,
        HEAD=dim, WIDTH=padded(dim), SPLITS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return output
