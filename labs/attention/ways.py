"""The ways to compute attention, in groups that compute the same.

``full`` and ``causal``   all lengths: naive (scores in memory), torch's own, ours
``window``                a causal window: torch computes all scores and masks; ours skips
``gqa``, ``mqa``          keys and values of fewer heads: repeated to all heads first, or shared
``token``                 one more token: everything again, or from a cache: whole, in pages, in 8 bits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from labs.attention import counts
from labs.attention.config import Config
from labs.attention.inputs import paged, qkv, quantized, token
from labs.lab import Recorder, Step, Variant
from labs.memory import extra_bytes


def _watched(make: Callable[[Config], Step]) -> Callable[[Any, Recorder], Step]:
    """A setup that also notes the step's extra memory."""

    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        with torch.no_grad():
            step = make(config)
        memory = extra_bytes(step)
        if memory is not None:
            recorder.record("extra_memory", memory, "B")
        return step

    return setup


def naive(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """softmax(Q K^T / sqrt(D)) V with all scores in memory."""
    scores = query @ key.transpose(-2, -1)
    scores *= 1 / math.sqrt(query.shape[-1])
    if mask is not None:
        scores.masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ value


def mask_of(kind: str, length: int, window: int) -> Any:
    """(length, length), True where query i sees key j; None without a mask."""
    import torch

    if kind in ("full", "gqa", "mqa"):
        return None
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen.triu(1 - window) if kind == "window" else seen


def _prefill(kind: str, length: int, name: str) -> Callable[[Config], Step]:
    def make(config: Config) -> Step:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        import kernels

        query, key, value = qkv(config, length, counts.key_heads(config, kind))
        mask = mask_of(kind, length, config.window)
        causal, shared = kind in ("causal", "window"), kind in ("gqa", "mqa")
        window = config.window if kind == "window" else None

        def expand(tensor: Any) -> Any:
            return tensor.repeat_interleave(config.heads // tensor.shape[1], 1) if shared else tensor

        def ours(key: Any, value: Any) -> Any:
            return kernels.scaled_dot_product_attention(
                query, key, value, is_causal=causal, window=window, enable_gqa=key.shape[1] != query.shape[1]
            )

        steps: dict[str, Step] = {
            "naive": lambda: naive(query, expand(key), expand(value), mask),
            "torch": lambda: sdpa(
                query,
                key,
                value,
                attn_mask=mask if kind == "window" else None,
                is_causal=kind == "causal",
                enable_gqa=shared,
            ),
            "repeated": lambda: ours(expand(key), expand(value)),
            "fused": lambda: ours(key, value),
        }
        step = steps[name]

        def run() -> Any:
            with torch.no_grad():
                return step()

        return run

    return make


def _token(length: int, name: str) -> Callable[[Config], Step]:
    def make(config: Config) -> Step:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        import kernels

        query, keys, values = token(config, length)
        if name == "recompute":
            # Every token again; only the last row is wanted. The other queries' values do not matter.
            queries = torch.randn(config.sequences, config.heads, length, config.dim)
            queries[:, :, -1] = query

            def again() -> Any:
                out = kernels.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )
                return out[:, :, -1]

            return again
        if name == "cache":
            return lambda: sdpa(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
        if name == "pages":
            (key_pages, table), (value_pages, _) = paged(config, keys), paged(config, values)
            lengths = torch.full((config.sequences,), length, dtype=torch.int32)
            return lambda: kernels.decode_attention(query, key_pages, value_pages, table, lengths)
        (small_keys, key_scale), (small_values, value_scale) = quantized(keys), quantized(values)

        def widened() -> Any:
            return sdpa(
                query[:, :, None], small_keys * key_scale, small_values * value_scale, enable_gqa=True
            )[:, :, 0]

        return widened

    return make


def groups(config: Config) -> list[tuple[str, int, tuple[str, ...]]]:
    """(kind, length, names) of every group, in the order of the lab's story."""
    longest = config.length
    return [
        *(("full", length, ("naive", "torch", "fused")) for length in config.lengths),
        *(("causal", length, ("naive", "torch", "fused")) for length in config.lengths),
        ("window", longest, ("naive", "torch", "fused")),
        ("gqa", longest, ("repeated", "torch", "fused")),
        ("mqa", longest, ("repeated", "torch", "fused")),
        *(("token", length, ("recompute", "cache", "pages", "cache_int8")) for length in config.lengths),
    ]


def variants(config: Config) -> Sequence[Variant]:
    found = []
    for kind, length, names in groups(config):
        for name in names:
            work = counts.work(config, kind, length, name)
            make = _token(length, name) if kind == "token" else _prefill(kind, length, name)
            found.append(
                Variant(
                    group=f"{kind}_{length}",
                    name=name,
                    setup=_watched(make),
                    flops=work.flops,
                    bytes_moved=work.bytes_moved,
                    working_set=work.bytes_moved,
                    threads=0,
                )
            )
    return found
