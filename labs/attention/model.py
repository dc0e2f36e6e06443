"""Seconds of each way, before it runs: the arithmetic of its tiles, what it moves, its calls.

``counts``    pairs, FLOPs and bytes of each way
``tiles``     which pairs a fused kernel computes beside those that are seen
``terms``     what a number of FLOPs, scores, bytes and calls costs
``prefill``   all queries; ``decoding`` one more token
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.attention import decoding, prefill
from labs.attention.config import Config
from labs.lab import Prediction
from labs.machine import Machine


def seconds(config: Config, machine: Machine, kind: str, length: int, name: str) -> tuple[float, str]:
    """Seconds of one call, and the formula with its numbers."""
    if kind == "token":
        return decoding.seconds(config, machine, length, name)
    return prefill.seconds(config, machine, kind, length, name)


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    from labs.attention.ways import groups

    found = []
    for kind, length, names in groups(config):
        for name in names:
            address = f"{kind}_{length}/{name}"
            value, because = seconds(config, machine, kind, length, name)
            suspect = SUSPECTS.get(name, "how near the kernel comes to the library's rate at this head size")
            found.append(Prediction(address, "time_s", value, because, suspect))
    return found


SUSPECTS = {
    "naive": "how many trips the scores make: the cache may hold them; and the mask, filled in one by one",
    "torch": "the library's kernel: its products, whose sides are unequal, and its exp",
    "pages": "what the caches still hold: a part that another core read last comes from that core's cache",
    "cache": "products with a single query, which the library's rate of square ones stands for",
    "cache_int8": "the widened copy, which may stay in cache, and the two multiplications that make it",
}


def memory_bytes(config: Config) -> float:
    """The naive way's scores and their float64 reference."""
    return 40.0 * config.heads * config.length**2 + 100.0 * config.sequences * config.length * config.dim
