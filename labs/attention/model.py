"""Bytes, FLOPs and seconds of each way, before it runs.

A pair of a query and a key costs 2 D FLOPs for its score, 2 D for its share of the value, and a softmax of
``SOFTMAX_SLOTS`` vector instructions (exp as a polynomial of about 20, maximum, subtraction, sum, scale).
The naive way also sends its scores to memory: written by the first product, read and written by the scale,
the mask and the softmax, read by the second product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labs.attention.config import Config
from labs.lab import Prediction
from labs.machine import Machine

SOFTMAX_SLOTS = 25
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What one call computes and moves. score_trips: how often all scores cross memory. slots: of softmax."""

    flops: float
    slots: float
    bytes_moved: float
    score_bytes: float = 0.0
    score_trips: int = 0


def pairs(kind: str, length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    if kind == "window":
        width = min(window, length)
        return length * width - width * (width - 1) // 2
    return length * (length + 1) // 2 if kind == "causal" else length * length


def work(config: Config, kind: str, length: int, name: str) -> Work:
    heads, dim = config.heads, config.dim
    if kind == "token":
        return _token_work(config, length, name)
    kv_heads = {"gqa": config.shared_heads, "mqa": 1}.get(kind, heads)
    # torch masks a window without skipping, and the naive way computes everything.
    computed = "full" if name == "naive" or (name == "torch" and kind == "window") else kind
    count = heads * pairs(computed, length, config.window)
    inputs = FLOAT * dim * length * (2 * heads + 2 * kv_heads)
    if name == "repeated":
        inputs += FLOAT * dim * length * 2 * (kv_heads + heads)  # read the few, write the many
    scores = FLOAT * heads * length**2 if name == "naive" else 0
    masked = kind in ("causal", "window")
    return Work(
        flops=4.0 * dim * count,
        slots=float(SOFTMAX_SLOTS * count),
        bytes_moved=inputs + (scores * (8 if masked else 6)),
        score_bytes=scores,
        score_trips=(8 if masked else 6) if scores else 0,
    )


def _token_work(config: Config, length: int, name: str) -> Work:
    sequences, heads, dim = config.sequences, config.heads, config.dim
    numbers = 2.0 * sequences * config.shared_heads * length * dim  # of keys and values
    cache = numbers * FLOAT
    if name == "recompute":
        count = sequences * heads * pairs("causal", length, 0)
        queries = 2.0 * FLOAT * sequences * heads * length * dim
        return Work(4.0 * dim * count, SOFTMAX_SLOTS * count, cache + queries)
    count = sequences * heads * length
    flops, slots = 4.0 * dim * count, float(SOFTMAX_SLOTS * count)
    if name == "cache_int8":
        scales = FLOAT * numbers / dim
        stored = numbers + scales
        # Widened before use: written as float32 and read again.
        return Work(flops, slots, stored + 2 * cache)
    return Work(flops, slots, cache)


def seconds(config: Config, machine: Machine, kind: str, length: int, name: str) -> tuple[float, str]:
    """Seconds of one call, and the formula with its numbers."""
    todo = work(config, kind, length, name)
    peak = machine.peak("float32", threads=0)
    compute = (todo.flops + 2 * todo.slots) / peak
    call = machine["torch_call_s"]
    text = f"({todo.flops:.3g} FLOPs + {todo.slots:.3g} softmax slots) at {peak / 1e9:.0f} GFLOP/s"
    if kind == "token" and name != "recompute":
        rate = machine.bandwidth(todo.bytes_moved, kind="read", threads=0)
        memory = todo.bytes_moved / rate
        return call + max(compute, memory), f"max({text}, {todo.bytes_moved:.3g} B at {rate / 1e9:.0f} GB/s)"
    memory = 0.0
    if todo.score_trips:
        rate = machine.bandwidth(2 * todo.score_bytes, threads=0)
        memory = todo.score_trips * todo.score_bytes / rate
        text += f" + {todo.score_trips} trips of {todo.score_bytes:.3g} B of scores at {rate / 1e9:.0f} GB/s"
        if machine.allocator == "default" and todo.score_bytes >= 2**25:
            fault = machine.get("page_fault_all_s_per_byte") or 0.0
            memory += 2 * todo.score_bytes * fault
            text += " + page faults of two fresh score matrices"
    return call + compute + memory, text


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    from labs.attention.ways import groups

    found = []
    for kind, length, names in groups(config):
        for name in names:
            address = f"{kind}_{length}/{name}"
            value, because = seconds(config, machine, kind, length, name)
            suspect = SUSPECTS.get(name, "how near the kernel comes to the FMA peak at this head size")
            found.append(Prediction(address, "time_s", value, because, suspect))
    return found


SUSPECTS = {
    "naive": "how many trips the scores make: the library may fuse scale and mask, or the cache holds them",
    "torch": "the library's kernel: its tiles, its exp, and whether a mask makes it leave its fast path",
    "pages": "the gather: short rows in random order defeat the prefetcher",
    "cache": "torch's path for a single query, which may use one thread",
    "cache_int8": "the widened copy, which may stay in cache, and the two multiplications that make it",
}


def memory_bytes(config: Config) -> float:
    """The naive way's scores and their float64 reference."""
    return 40.0 * config.heads * config.length**2 + 100.0 * config.sequences * config.length * config.dim
