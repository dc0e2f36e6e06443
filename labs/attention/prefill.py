"""Seconds of attention of all queries: naive, torch's kernel, ours."""

from __future__ import annotations

from labs.attention import counts, terms
from labs.attention.config import Config
from labs.attention.terms import Term
from labs.attention.tiles import Tiles, library, own
from labs.machine import MMAP_THRESHOLD_BYTES, Machine
from labs.wording import duration

LIBRARY_CALLS = 6  # torch's operation, its kernel and their four new tensors
OWN_CALLS = 9  # in our operator: conversions, the stand-in of a mask, new tensors, a view
REPEAT_CALLS = 5  # of one repeat_interleave: two views, a new tensor, the copy, a view


def seconds(config: Config, machine: Machine, kind: str, length: int, name: str) -> Term:
    heads, kv_heads = config.heads, counts.key_heads(config, kind)
    if name == "naive":
        return _naive(config, machine, kind, length)
    if name == "torch":
        found = _library(config, machine, length, kind == "causal")
        return terms.summed(found, _mask(machine, heads, length)) if kind == "window" else found
    window = config.window if kind == "window" else 0
    if name == "fused":
        return own_seconds(machine, (heads, kv_heads), length, config.dim, kind == "causal", window)
    copied = counts.repeated_bytes(config, kv_heads, length)
    return terms.summed(
        own_seconds(machine, (heads, heads), length, config.dim),
        terms.moved(machine, copied, copied, "repeated heads"),
        terms.calls(machine, 2 * REPEAT_CALLS, regions=2),
    )


def _naive(config: Config, machine: Machine, kind: str, length: int) -> Term:
    work = counts.work(config, kind, length, "naive")
    operations = 7 if kind in ("causal", "window") else 5
    scores = config.heads * length**2
    found = terms.summed(
        terms.products(machine, work.flops, 2.0 * config.dim * length**2),
        terms.softmax(machine, scores, config.heads * length, terms.LIBRARY_SOFTMAX),
        terms.moved(
            machine,
            work.score_trips * work.score_bytes,
            2 * work.score_bytes,
            f"{work.score_trips} trips of the scores",
        ),
        terms.calls(machine, operations, regions=operations),
    )
    if machine.allocator == "default" and work.score_bytes >= MMAP_THRESHOLD_BYTES:
        faults = 2 * work.score_bytes * (machine.get("page_fault_all_s_per_byte") or 0.0)
        found = terms.summed(found, (faults, f"page faults of two score matrices {duration(faults)}"))
    return found


def _library(config: Config, machine: Machine, length: int, causal: bool) -> Term:
    tiles = library(length, length, causal)
    return terms.summed(
        *_arithmetic(machine, config.heads, config.dim, tiles, terms.LIBRARY_SOFTMAX),
        terms.calls(machine, LIBRARY_CALLS),
    )


def _mask(machine: Machine, heads: int, length: int) -> Term:
    """Booleans become numbers by two selections, which write a matrix each; every head reads the last."""
    made = (2 * (1 + counts.FLOAT) + counts.FLOAT) * length**2
    read = counts.FLOAT * heads * length**2
    return terms.moved(machine, made + read, 2 * counts.FLOAT * length**2, "mask")


def own_seconds(
    machine: Machine,
    heads: tuple[int, int],
    length: int,
    dim: int,
    causal: bool = False,
    window: int = 0,
) -> Term:
    """Our kernel. heads: of queries, of keys and values; of all sequences together."""
    tiles = own(length, int(machine["vector_lanes_float32"]), causal, window)
    keys = counts.FLOAT * heads[1] * length * dim
    return terms.summed(
        *_arithmetic(machine, heads[0], dim, tiles, terms.OWN_SOFTMAX),
        terms.moved(machine, 2 * keys, 2 * keys, "packed keys"),
        terms.calls(machine, OWN_CALLS, regions=2, custom=1),
    )


def _arithmetic(machine: Machine, heads: int, dim: int, tiles: Tiles, instructions: int) -> tuple[Term, Term]:
    return (
        terms.products(machine, 2.0 * heads * dim * (tiles.scores + tiles.values), 2.0 * dim * tiles.tile),
        terms.softmax(machine, heads * tiles.weights, heads * tiles.rows, instructions),
    )
