"""Attention: sizes, arithmetic, peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from kernels import attention
from kernels.attention import reference
from kernels.spec import Arguments, Benchmark, Case, Operation, Step, tensor_bytes


def _attend(
    label: str,
    batch: int,
    heads: int,
    length: int,
    keys: int,
    dim: int,
    kv_heads: int | None = None,
    mask: str = "",
    **options: Any,
) -> Case:
    """mask: ``bool`` or ``added``, and which dimensions it has: ``bool hls`` is (heads, length, keys)."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        own = kv_heads or heads
        arguments: Arguments = {
            "query": random(batch, heads, length, dim),
            "key": random(batch, own, keys, dim),
            "value": random(batch, own, keys, dim),
            **options,
        }
        if own != heads:
            arguments["enable_gqa"] = True
        if mask:
            kind, axes = mask.split()
            sizes = {"b": batch, "h": heads, "l": length, "s": keys, "1": 1}
            values = torch.randn([sizes[axis] for axis in axes], generator=generator)
            arguments["attn_mask"] = values > -0.5 if kind == "bool" else values.to(dtype)
        return arguments

    return Case(label, make)


def _torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None, **options: Any
) -> torch.Tensor:
    if window is not None:
        options["attn_mask"] = reference.band(query.shape[-2], key.shape[-2], True, window, query.device)
        options["is_causal"] = False
    return F.scaled_dot_product_attention(query, key, value, **options)


def pairs(length: int, keys: int, is_causal: bool, window: int | None) -> int:
    """How many (query, key) are looked at."""
    if not is_causal and window is None:
        return length * keys
    least = 0 if window is None else window
    return sum(
        max(0, min(i + 1, keys) - (max(0, i + 1 - least) if window is not None else 0)) for i in range(length)
    )


def _flops(arguments: Arguments, backward: bool) -> int:
    """Two products forward (2 a pair and element each), five backward, of the pairs that are seen."""
    batch, heads, length, dim = arguments["query"].shape
    seen = pairs(
        length, arguments["key"].shape[-2], arguments.get("is_causal", False), arguments.get("window")
    )
    return (10 if backward else 4) * batch * heads * dim * seen


def _bytes(arguments: Arguments, backward: bool) -> int:
    query, key, value = (tensor_bytes(arguments[name]) for name in ("query", "key", "value"))
    mask = tensor_bytes(arguments.get("attn_mask"))
    return mask + (4 * query + 2 * (key + value) if backward else 2 * query + key + value)


def _decode_case(
    label: str, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, block_size: int
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        wide = max(1, -(-max(lengths) // block_size))
        blocks = len(lengths) * wide + 1
        cache = (blocks, block_size, kv_heads, dim)
        order = torch.randperm(blocks, generator=generator)[: len(lengths) * wide]
        return {
            "query": torch.randn(len(lengths), heads, dim, generator=generator).to(dtype),
            "key_cache": torch.randn(cache, generator=generator).to(dtype),
            "value_cache": torch.randn(cache, generator=generator).to(dtype),
            "block_table": order.view(len(lengths), wide).int(),
            "context_lengths": torch.tensor(lengths, dtype=torch.int32),
        }

    return Case(label, make)


def gathered_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """torch's way for all sequences at once: pages gathered side by side, SDPA with a mask of the lengths."""
    sequences, heads, dim = query.shape
    kv_heads = key_cache.shape[2]
    keys, values = (
        cache[block_table.long()].view(sequences, -1, kv_heads, dim).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    seen = torch.arange(keys.shape[2], device=query.device) < context_lengths[:, None]
    out = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, seen[:, None, None], scale=scale, enable_gqa=heads != kv_heads
    )
    return out[:, :, 0]


def looped_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """torch's way sequence by sequence: no more keys than each has, no mask."""
    _, block_size, kv_heads, dim = key_cache.shape
    outputs = []
    for row, length, table in zip(query, context_lengths.tolist(), block_table, strict=True):
        pages = table[: -(-length // block_size)].long()
        keys, values = (
            cache[pages].view(-1, kv_heads, dim)[:length].transpose(0, 1)
            for cache in (key_cache, value_cache)
        )
        outputs.append(
            F.scaled_dot_product_attention(
                row[:, None], keys, values, scale=scale, enable_gqa=row.shape[0] != kv_heads
            )[:, 0]
        )
    return torch.stack(outputs)


def _decode_bytes(arguments: Arguments, backward: bool) -> int:
    """The keys and values of the contexts, the queries and the outputs."""
    cache = arguments["key_cache"]
    table = arguments["block_table"]
    keys = table.shape[0] * table.shape[1] * cache.shape[1]  # the table is full at the sizes worth timing
    return 2 * keys * cache.shape[2] * cache.shape[3] * cache.element_size() + 2 * tensor_bytes(
        arguments["query"]
    )


OPERATIONS = [
    Operation(
        name="scaled_dot_product_attention",
        function=attention.scaled_dot_product_attention,
        reference=reference.scaled_dot_product_attention,
        eager=_torch,
        cases=[
            _attend("1 query 4x16 keys 33", 4, 16, 1, 33, 32),
            _attend("causal gqa 1x4x70 dim 24", 1, 4, 70, 70, 24, kv_heads=2, is_causal=True),
            _attend("2x3x37 keys 131 dim 64", 2, 3, 37, 131, 64),
            _attend("causal 1x2x150 keys 67 dim 40", 1, 2, 150, 67, 40, is_causal=True),
            _attend("causal 1x2x67 keys 150 dim 17", 1, 2, 67, 150, 17, is_causal=True, scale=0.3),
            _attend("window 1x2x300 dim 80", 1, 2, 300, 300, 80, window=70),
            _attend("window 3 1x2x50 dim 16", 1, 2, 50, 50, 16, window=3),
            _attend("mqa 1x3x33 dim 128", 1, 3, 33, 65, 128, kv_heads=1),
            _attend("bool mask 2x2x40 keys 90", 2, 2, 40, 90, 32, mask="bool b1ls"),
            _attend("added mask 2x2x40 keys 90", 2, 2, 40, 90, 32, mask="added h1s"),
            _attend("dim 256", 1, 1, 20, 70, 256),
            _attend("no batch", 0, 2, 8, 8, 16),
        ],
        sizes=[_attend("12x1024x64 causal", 1, 12, 1024, 1024, 64, is_causal=True)],
        bytes_moved=_bytes,
        flops=_flops,
        gradients=("query", "key", "value"),
        targets={"forward": 0.9, "backward": None},
        sized=lambda rows, columns: _attend(
            f"12x{rows}x{columns} causal", 1, 12, rows, rows, columns, is_causal=True
        ),
        columns=64,
    ),
    Operation(
        name="decode_attention",
        function=attention.decode_attention,
        reference=reference.decode_attention,
        eager=gathered_decode,
        cases=[
            _decode_case("1 key", (1,), 2, 2, 64, 1),
            _decode_case("ragged gqa", (70, 1, 33, 128), 6, 2, 40, 16),
            _decode_case("mqa dim 128", (300, 17), 8, 1, 128, 32),
            _decode_case("dim 7 blocks of 3", (29, 31, 5), 32, 8, 7, 3),
        ],
        sizes=[_decode_case("8x1024 keys 32/8 heads of 128", (1024,) * 8, 32, 8, 128, 16)],
        bytes_moved=_decode_bytes,
        peers={
            "torch loop": lambda arguments, direction: lambda: looped_decode(**arguments),
        },
        targets={"forward": 1.0},
        sized=lambda rows, columns: _decode_case(
            f"{rows}x{columns} keys 32/8 heads of 64", (columns,) * rows, 32, 8, 64, 16
        ),
    ),
]


def _window_ways(device: str) -> Mapping[str, Step]:
    """A sliding window: SDPA with the mask made beforehand, and flex_attention, which skips whole tiles."""
    generator = torch.Generator().manual_seed(0)
    window, shape = 256, (1, 12, 2048, 64)
    query, key, value = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    seen = reference.band(2048, 2048, True, window, device)
    found: dict[str, Step] = {
        "kernels": lambda: attention.scaled_dot_product_attention(query, key, value, window=window),
        "torch": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=seen),
    }
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def near(batch: Any, head: Any, i: Any, j: Any) -> Any:
            return (j <= i) & (j > i - window)

        blocks = create_block_mask(near, None, None, 2048, 2048, device=device)
        compiled = torch.compile(flex_attention)
        compiled(query, key, value, block_mask=blocks)  # no backend for it on every machine
        found["flex_attention"] = lambda: compiled(query, key, value, block_mask=blocks)
    except Exception:
        pass
    return found


_WINDOW_BYTES = 4 * 12 * 2048 * 64 * 4

BENCHMARKS = [
    Benchmark(
        "scaled_dot_product_attention",
        "forward",
        "12x2048x64 window 256",
        torch.float32,
        _window_ways,
        _WINDOW_BYTES,
        4 * 12 * 64 * pairs(2048, 2048, True, 256),
        1.0,
    )
]
