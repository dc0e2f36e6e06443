"""Seconds of one more token: everything again, or from a cache.

With one query a number of the cache takes part in one FMA: reading it and computing do not overlap, as a
core that waits for a line has too little room to compute ahead. So the sum, not the larger.
"""

from __future__ import annotations

import math

from labs.attention import counts, terms
from labs.attention.config import Config
from labs.attention.prefill import LIBRARY_CALLS, own_seconds
from labs.attention.terms import Term
from labs.attention.tiles import ROWS, library, panel
from labs.machine import Machine
from labs.packed_code import instruction_seconds
from labs.wording import duration

INT8 = 1  # byte
LEAST_CHUNKS, LEAST_KEYS = 16, 256  # kernels.attention.cpu_decode: into how many parts the keys are cut
VIEW_CALLS = 2  # around the operation: the query with a dimension more, the output with one less
DECODE_CALLS = 9  # in our operator: new tensors, the check of the table, views, conversions
JOIN_CALLS = 4  # where keys are cut into parts: softmax, nan_to_num, a view, vecdot


def seconds(config: Config, machine: Machine, length: int, name: str) -> Term:
    if name == "recompute":
        heads = config.sequences * config.heads, config.sequences * config.shared_heads
        return own_seconds(machine, heads, length, config.dim, causal=True)
    if name == "pages":
        return _pages(config, machine, length)
    found = _library(config, machine, length)
    return terms.summed(found, *_widened(config, machine, length)) if name == "cache_int8" else found


def _library(config: Config, machine: Machine, length: int) -> Term:
    """torch's kernel, a query at a time: each of a group of heads reads the keys and values anew, all but
    the first from its core's cache."""
    tiles = library(1, length, causal=False)
    heads = config.sequences * config.heads
    cache = counts.FLOAT * counts.cached_numbers(config, length)
    one_head = machine.cores * cache / (config.sequences * config.shared_heads)
    again = config.heads // config.shared_heads - 1
    return terms.summed(
        terms.products(machine, 4.0 * config.dim * heads * tiles.scores, 2.0 * config.dim * tiles.tile),
        terms.softmax(machine, heads * tiles.weights, heads * tiles.rows, terms.LIBRARY_SOFTMAX),
        terms.moved(machine, cache, cache, "cache", kind="read"),
        terms.moved(machine, again * cache, one_head, "it again", kind="read"),
        terms.calls(machine, VIEW_CALLS + LIBRARY_CALLS),
    )


def _widened(config: Config, machine: Machine, length: int) -> tuple[Term, Term]:
    """int8 times float32, of keys and of values: converted to a matrix, which is then multiplied."""
    numbers = counts.cached_numbers(config, length)
    passed = (INT8 + counts.FLOAT) + 2 * counts.FLOAT
    return (
        terms.moved(
            machine, passed * numbers, (INT8 + 2 * counts.FLOAT) * numbers / 2, "widened keys and values"
        ),
        terms.calls(machine, 4, regions=4),
    )


def _pages(config: Config, machine: Machine, length: int) -> Term:
    """Ours: a head's keys and values, once for its group of queries. Keys are transposed into tiles: a load,
    a store and a step for each halving of the lanes. Where no whole vectors lie in a page, rows of keys and
    of values are loaded and stored before that."""
    lanes = int(machine["vector_lanes_float32"])
    whole = config.sequences * config.shared_heads
    pages = -(-length // config.block) * config.block
    parts = max(1, min(-(-pages // LEAST_KEYS), -(-LEAST_CHUNKS // whole)))
    group = config.heads // config.shared_heads
    rows = -(-group // ROWS) * ROWS
    keys = whole * length
    cache = counts.FLOAT * counts.cached_numbers(config, length)
    gathered = 4 if config.block % lanes or config.dim % lanes else 0
    arranged = keys * config.dim * (2 + math.log2(lanes) + gathered)
    arranging = instruction_seconds(machine, 1, arranged) / terms.cores(machine)
    joined = JOIN_CALLS if parts > 1 else 0
    tiles = -(-length // panel(lanes))
    return terms.summed(
        terms.products(machine, 4.0 * config.dim * rows * keys, 2.0 * config.dim * rows * (length / parts)),
        terms.softmax(machine, group * keys, group * whole * tiles, terms.OWN_SOFTMAX),
        (arranging, f"keys brought into tiles {duration(arranging)}"),
        _read_by_any(machine, cache),
        terms.calls(machine, DECODE_CALLS + joined, regions=1, custom=1),
    )


def _read_by_any(machine: Machine, cache: float) -> Term:
    """Any core takes any part, and at the next call another one: the caches of each must hold all of it."""
    everyone = machine.bandwidth(cache, kind="read", threads=0)
    rate = min(everyone, machine.cores * machine.bandwidth(cache, kind="read"))
    return cache / rate, f"{cache:.3g} B of cache at {rate / 1e9:.0f} GB/s {duration(cache / rate)}"
