"""The groups: each collective in every way, a sweep of all-reduces, more ranks, and layers that overlap."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from labs.collectives import overlap
from labs.collectives.calls import OURS, Shown, call, count_sent, group_of
from labs.collectives.config import FLOAT, Config
from labs.lab import Recorder, Step, Variant

OPERATIONS = (
    "broadcast", "scatter", "gather", "reduce", "all_gather", "reduce_scatter", "all_reduce", "all_to_all",
)  # fmt: skip
SWEEP, SWEEP_WAYS = "all_reduce_sizes", ("gloo", "shm", "ours_ring")


def ways_of(operation: str) -> tuple[str, ...]:
    if operation == "all_reduce":
        return "gloo", "shm", f"{OURS}_ring", f"{OURS}_halving_doubling", f"{OURS}_tree"
    return "gloo", "shm", OURS


def more_group(ranks: int) -> str:
    return f"all_reduce_{ranks}_ranks"


def _setup(operation: str, way: str, kib: int, ranks: int, counted: bool) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        elements = config.elements(ranks, kib)
        if counted:
            count_sent(operation, way, elements, recorder)
        group = group_of(way)
        return Shown(call(operation, way, elements, group), group)

    return setup


def variants(config: Config) -> Sequence[Variant]:
    found = []

    def add(group: str, name: str, operation: str, way: str, kib: int, ranks: int, **more: Any) -> None:
        counted = group == operation and way.startswith(OURS)
        size = float(FLOAT * config.elements(ranks, kib))
        setup = _setup(operation, way, kib, ranks, counted)
        found.append(Variant(group, name, setup, working_set=2 * size, processes=ranks, **more))

    for operation in OPERATIONS:
        for way in ways_of(operation):
            add(operation, way, operation, way, config.size_KiB, config.ranks)
    for kib in config.sweep_KiB:
        for way in SWEEP_WAYS:
            add(SWEEP, f"{way}_{kib}", "all_reduce", way, kib, config.ranks)
    if config.more_ranks:
        # PERFLAB_WORLD is there when torchrun started the ranks: then there is no second world.
        reason = "torchrun started one world only" if "PERFLAB_WORLD" in os.environ else ""
        for way in SWEEP_WAYS:
            group = more_group(config.more_ranks)
            add(group, way, "all_reduce", way, config.size_KiB, config.more_ranks, unavailable=reason)
    for kind in overlap.KINDS:
        flops = 2.0 * config.layers * config.width**3
        for name in overlap.NAMES:
            found.append(
                Variant(
                    f"overlap_{kind}",
                    name,
                    overlap.setup_of(kind, name),
                    flops=flops if kind == "matmul" and name != "communication" else 0.0,
                    processes=config.ranks,
                    max_rounds=12,
                )
            )
    return found
