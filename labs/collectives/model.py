"""Seconds and bytes of each collective and of each step of layers, before they run.

gloo's collectives: labs/gloo_costs.py. Ours send messages through gloo: the alpha-beta cost of their
algorithm (parallel/collective_costs.py), whose rings, halvings and pairs are exchanges (both ranks send at
once) and whose trees are messages (one way), what Python costs behind each wait, and what is copied and
combined. shm's run in the calling thread: what torch.distributed costs in Python, and the memory that all
ranks read and write. More ranks than cores share them: times ranks / cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from labs import gloo_costs
from labs.collectives import overlap
from labs.collectives.calls import OURS, algorithm_of
from labs.collectives.config import FLOAT, SMALL_KIB, Config
from labs.collectives.ways import OPERATIONS, SWEEP, SWEEP_WAYS, more_group, ways_of
from labs.lab import Prediction
from labs.machine import Machine

IN_PLACE = ("reduce", "all_reduce")  # refilled before each call
SHM_CALLS = {
    "broadcast": 20, "scatter": 24, "gather": 22, "reduce": 27,
    "all_gather": 31, "reduce_scatter": 38, "all_reduce": 8, "all_to_all": 67,
}  # fmt: skip
"""Torch calls' worth of Python between torch.distributed and shared memory (a world of one rank, where
nothing is exchanged; all_reduce has a way of its own for more)."""
SHM_PARTS_CALLS = 52  # of an all_reduce in two exchanges, by the same measure
SHM_MOVED = {
    "broadcast": (0, 0, 2, 0), "scatter": (-2, 4, 0, 0), "gather": (0, 4, 0, 0), "reduce": (0, 1, 3, 0),
    "all_gather": (0, 2, 2, 0), "reduce_scatter": (0, -1, 3, 0), "all_reduce": (0, 0, 3, 1),
    "all_to_all": (0, -2, 4, 0),
}  # fmt: skip
"""Bytes that all ranks read and write: a multiple of a part, of the whole vector, of ranks x it, and of
ranks^2 x it.

What is copied in or out is read and written; a sum reads every rank's, and is written. Where each rank gets
another part, nobody copies in the part that is for itself. What another core has written comes no faster
than from beyond a core's own caches.
"""
SHM_PARTS_MOVED = 0, -1, 5, 0
"""Of an all_reduce in two exchanges. Each rank copies in all parts but its own, 2(p-1) n together, and sums
its own, (p+1) n; then each part is copied in, 2 n, and out by all ranks but its own, 2(p-1) n."""
CALL_CALLS = 18  # torch calls' worth of Python in a call of ours, without messages (a world of one rank)
ROUND_CALLS = 5  # and in what a round's messages are made of
TREE_AND_RING = ("scatter_all_gather", "reduce_scatter_gather")
COMBINED = 3.0  # bytes for each that is added: two are read, one is written
MOVED = {
    "broadcast": (0.0, 0.0), "scatter": (2.0, 2.0), "gather": (2.0, 2.0),
    "all_gather": (0.0, 2.0), "reduce_scatter": (2.0 + COMBINED, 2.0 - COMBINED), "all_to_all": (0.0, 2.0),
}  # fmt: skip
"""Bytes that ours reads and writes on the busiest rank where it does not depend on the algorithm: a multiple
of the whole vector, and of a part. A ring's rank combines all but its part."""
BRUCK_MOVED = 4.0  # of the whole vector more: its blocks are turned into the order of ranks, and copied out
CLONED = 2.0  # bytes for each of the vector of a rank that must not write into its own


def seconds(machine: Machine, operation: str, way: str, size: int, ranks: int) -> tuple[float, str]:
    """Seconds of one call on ``size`` bytes, and the formula with its numbers."""
    crowd = max(1.0, ranks / machine.cores)
    text = f", x {crowd:g} for {ranks} ranks on {machine.cores} cores" if crowd > 1 else ""
    refill = 2 * size / machine.bandwidth(2 * size, threads=1) if operation in IN_PLACE else 0.0
    find = {"gloo": _of_gloo, "shm": _of_shm}.get(way)
    if find is None:
        value, because = _of_ours(machine, operation, algorithm_of(way), size, ranks)
    else:
        value, because = find(machine, operation, size, ranks)
    return crowd * value + refill, f"{because}{text}{' + refilling it' if refill else ''}"


def _of_gloo(machine: Machine, operation: str, size: int, ranks: int) -> tuple[float, str]:
    link = gloo_costs.link(machine)
    because = (
        f"{operation} of {size} B on {ranks} ranks, {gloo_costs.HAND_OVERS} hand-overs of "
        f"{1e6 * machine['thread_switch_s']:.0f} us, {link}"
    )
    return gloo_costs.seconds(machine, operation, size, ranks), because


def _of_shm(machine: Machine, operation: str, size: int, ranks: int) -> tuple[float, str]:
    from parallel.shm import ALL_OF_ALL_BYTES

    calls, times = SHM_CALLS[operation], SHM_MOVED[operation]
    if operation == "all_reduce" and ranks > 2 and size > ALL_OF_ALL_BYTES:
        calls, times = SHM_PARTS_CALLS, SHM_PARTS_MOVED
    moved = size * sum(number * ranks**power for power, number in enumerate(times, -1))
    own = (machine.get("l2_bytes") or 0.0) * machine.cores
    rate = machine.bandwidth(max(moved, 2 * own), threads=0)
    because = f"{calls} torch calls + {moved:.3g} B at {rate / 1e9:.1f} GB/s"
    return calls * machine["torch_call_s"] + moved / rate, because


def _of_ours(
    machine: Machine, operation: str, algorithm: str | None, size: int, ranks: int
) -> tuple[float, str]:
    from parallel import collective_costs as costs

    link = gloo_costs.link(machine)
    algorithm = algorithm or costs.choose(operation, size, ranks)
    transfer = costs.ALGORITHMS[operation][algorithm]
    if algorithm == "tree":
        passing = transfer(size, ranks, *link.message)
    elif algorithm in TREE_AND_RING:
        tree = costs.tree_scatter_cost(size, ranks, *link.message)
        passing = tree + costs.ring_all_gather_cost(size, ranks, *link.exchange)
    else:
        passing = transfer(size, ranks, *link.exchange)
    calls = CALL_CALLS + ROUND_CALLS * transfer(0.0, ranks, 1.0, 0.0)
    python = calls * machine["torch_woken_call_s"]
    moved = _moved_by_ours(operation, algorithm, ranks) * size
    because = (
        f"{algorithm} of {size} B on {ranks} ranks, {calls:.0f} torch calls of "
        f"{1e6 * machine['torch_woken_call_s']:.1f} us, {link}"
    )
    return passing + python + moved / machine.bandwidth(moved), because


def _moved_by_ours(operation: str, algorithm: str, ranks: int) -> float:
    """Bytes that ranks read and write in a row, besides their messages, for each of the whole vector."""
    from parallel.collective_costs import rounds

    if operation not in IN_PLACE:
        whole, part = MOVED[operation]
        return whole + part / ranks + (BRUCK_MOVED if algorithm == "bruck" else 0.0)
    if algorithm == "tree":
        # From four ranks on, one below the root has ranks below itself, whose sums go into a clone.
        return rounds(ranks) * COMBINED + (CLONED if ranks > 3 else 0.0)
    power = 1 << (ranks.bit_length() - 1)
    if algorithm == "halving_doubling" and power < ranks:  # those above the power of two give theirs first
        return COMBINED + COMBINED * (power - 1) / power
    cloned = CLONED if algorithm == "reduce_scatter_gather" else 0.0
    return COMBINED * (ranks - 1) / ranks + cloned


def sent(operation: str, way: str, elements: int, ranks: int) -> int:
    """Bytes that all ranks together send in one call of ours: exact."""
    from parallel.collective_bytes import predict_communication

    each = (
        predict_communication(
            operation, elements, FLOAT, ranks, rank, algorithm=algorithm_of(way), checked=False
        )
        for rank in range(ranks)
    )
    return sum(found.get("send", 0) for found in each)


def layers(compute: float, communication: float, count: int, name: str) -> float:
    """Seconds of a step of ``count`` layers, each ``compute`` and then ``communication`` of its result."""
    return {
        "compute": count * compute,
        "communication": count * communication,
        "waited": count * (compute + communication),
        "asynchronous": compute + (count - 1) * max(compute, communication) + communication,
    }[name]


def layer_seconds(config: Config, machine: Machine, kind: str) -> tuple[float, float, str]:
    """Compute and communication of one layer, and where they come from."""
    size = FLOAT * config.bucket_rows * config.width
    through, _ = seconds(machine, "all_reduce", "gloo", size, config.ranks)
    communication = config.link_ms / 1e3 + through
    if kind == "virtual":
        compute, text = config.compute_ms / 1e3, "of sleep"
    else:
        peak = machine.peak("float32", threads=1)
        compute = 2.0 * config.width**3 / peak * max(1.0, config.ranks / machine.cores)
        text = f"of {2e-9 * config.width**3:.2g} GFLOP at {peak / 1e9:.0f} GFLOP/s"
    return compute, communication, text


def _collectives(config: Config, machine: Machine) -> Iterator[Prediction]:
    for operation in OPERATIONS:
        elements = config.elements(config.ranks, config.size_KiB)
        for way in ways_of(operation):
            value, because = seconds(machine, operation, way, FLOAT * elements, config.ranks)
            address = f"{operation}/{way}"
            yield Prediction(address, "time_s", value, because, SUSPECTS[way.partition("_")[0]])
            if way.startswith(OURS):
                total = sent(operation, way, elements, config.ranks)
                because = f"what the messages of {config.ranks} ranks add up to"
                yield Prediction(address, "sent_B", float(total), because, exact=True)


def _sizes(config: Config, machine: Machine) -> Iterator[Prediction]:
    for kib in config.sweep_KiB:
        size = FLOAT * config.elements(config.ranks, kib)
        for way in SWEEP_WAYS:
            value, because = seconds(machine, "all_reduce", way, size, config.ranks)
            yield Prediction(
                f"{SWEEP}/{way}_{kib}", "time_s", value, because, SUSPECTS[way.partition("_")[0]]
            )
    smallest, largest = (1024 * SMALL_KIB[index] for index in (0, -1))
    for way in SWEEP_WAYS:
        ends = [seconds(machine, "all_reduce", way, size, config.ranks)[0] for size in (smallest, largest)]
        per_byte = (ends[1] - ends[0]) / (largest - smallest)
        because = "the straight line through the predicted times of the small all-reduces"
        suspect = SUSPECTS[way.partition("_")[0]]
        yield Prediction("", f"fit_{way}_latency_s", ends[0] - smallest * per_byte, because, suspect)
        yield Prediction("", f"fit_{way}_s_per_byte", per_byte, because, suspect)
        yield Prediction(
            "",
            f"large_{way}_ratio",
            1.0,
            f"{config.large_KiB} KiB measured / by alpha and beta of {SMALL_KIB[0]} to {SMALL_KIB[-1]} KiB",
            "a large vector leaves the cache, and messages are cut into segments",
        )


def _more_ranks(config: Config, machine: Machine) -> Iterator[Prediction]:
    for ranks in (config.more_ranks,) if config.more_ranks else (3, 4):
        size = FLOAT * config.elements(ranks, config.size_KiB)
        for way in SWEEP_WAYS:
            value, because = seconds(machine, "all_reduce", way, size, ranks)
            if config.more_ranks:
                suspect = "ranks that share a core wait for each other's turn"
                yield Prediction(f"{more_group(ranks)}/{way}", "time_s", value, because, suspect)
            else:
                because += "; not measured (more_ranks=0)"
                yield Prediction("", f"all_reduce_{way}_{ranks}_ranks_s", value, because)


def _overlap(config: Config, machine: Machine) -> Iterator[Prediction]:
    count = config.layers
    texts = {
        "compute": "{n} x {c}",
        "communication": "{n} x {k}",
        "waited": "{n} x ({c} + {k})",
        "asynchronous": "{c} + {less} x max({c}, {k}) + {k}",
    }
    for kind in overlap.KINDS:
        compute, communication, source = layer_seconds(config, machine, kind)
        numbers = {"n": count, "less": count - 1, "c": _ms(compute), "k": _ms(communication)}
        for name in overlap.NAMES:
            yield Prediction(
                f"overlap_{kind}/{name}",
                "time_s",
                layers(compute, communication, count, name),
                f"{texts[name].format(**numbers)} ({source}; a link of {config.link_ms:g} ms)",
                "other programs on the cores, which make a rank late and all others wait for it",
            )
        yield Prediction(
            "",
            f"hidden_{kind}_ratio",
            (count - 1) / count,
            f"all layers but one of {count}: the last one's collective has nothing left to hide behind",
            "above: ranks that wake late from each wait; below: other programs on the cores",
        )


def _ms(value: float) -> str:
    return f"{1e3 * value:.1f} ms"


SUSPECTS = {
    "gloo": "gloo's thread, which spins until the system's tick while the holder of its lock has no core",
    "shm": "a rank that is not on a core: shared memory spins briefly, yields, then sleeps",
    "ours": "the same at each of its messages, which are called from Python",
}


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    parts = (_collectives, _sizes, _more_ranks, _overlap)
    return [found for part in parts for found in part(config, machine)]


def memory_bytes(config: Config) -> float:
    """Every rank's copies of the largest vector, shm's segments, and torch itself."""
    ranks = max(config.ranks, config.more_ranks)
    return ranks * (8 * 1024.0 * max(config.large_KiB, config.size_KiB) + 12.0 * config.width**2 + 3e8)
