"""What one call of each way computes and moves: pairs, FLOPs, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from labs.attention.config import Config

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What one call computes and moves. score_trips: how often all scores cross memory."""

    flops: float
    bytes_moved: float
    score_bytes: float = 0.0
    score_trips: int = 0


def pairs(kind: str, length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    if kind == "window":
        width = min(window, length)
        return length * width - width * (width - 1) // 2
    return length * (length + 1) // 2 if kind == "causal" else length * length


def key_heads(config: Config, kind: str) -> int:
    """Heads of keys and values."""
    return {"gqa": config.shared_heads, "mqa": 1, "token": config.shared_heads}.get(kind, config.heads)


def work(config: Config, kind: str, length: int, name: str) -> Work:
    """A pair costs 2 D FLOPs for its score and 2 D for its share of the value.

    The naive way also sends its scores to memory: written by the first product, read and written by the
    scale, the mask and the softmax, read by the second product.
    """
    heads, dim = config.heads, config.dim
    if kind == "token":
        return _token_work(config, length, name)
    kv_heads = key_heads(config, kind)
    # torch masks a window without skipping, and the naive way computes everything.
    computed = "full" if name == "naive" or (name == "torch" and kind == "window") else kind
    inputs = FLOAT * dim * length * (2 * heads + 2 * kv_heads)
    if name == "repeated":
        inputs += repeated_bytes(config, kv_heads, length)
    scores = FLOAT * heads * length**2 if name == "naive" else 0
    trips = 8 if kind in ("causal", "window") else 6
    return Work(
        flops=4.0 * dim * heads * pairs(computed, length, config.window),
        bytes_moved=inputs + scores * trips,
        score_bytes=scores,
        score_trips=trips if scores else 0,
    )


def repeated_bytes(config: Config, kv_heads: int, length: int) -> int:
    """Reading the few heads of keys and values, writing the many."""
    return FLOAT * config.dim * length * 2 * (kv_heads + config.heads)


def cached_numbers(config: Config, length: int) -> float:
    """Of keys and values, all sequences."""
    return 2.0 * config.sequences * config.shared_heads * length * config.dim


def _token_work(config: Config, length: int, name: str) -> Work:
    sequences, heads, dim = config.sequences, config.heads, config.dim
    numbers = cached_numbers(config, length)
    cache = numbers * FLOAT
    if name == "recompute":
        queries = 2.0 * FLOAT * sequences * heads * length * dim
        return Work(4.0 * dim * sequences * heads * pairs("causal", length, 0), cache + queries)
    flops = 4.0 * dim * sequences * heads * length
    # Widened before use: written as float32 and read again.
    stored = numbers + FLOAT * numbers / dim + 2 * cache if name == "cache_int8" else cache
    return Work(flops, stored)
