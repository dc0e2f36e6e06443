"""Seconds and bytes of each collective and of each step of layers, before they run.

gloo and ours send messages through gloo, so both are predicted by the alpha-beta cost of their algorithm
(parallel/collective_costs.py) with the latency and the seconds a byte of a ping-pong (calibration_links).
shm's all-reduce runs in the calling thread: what torch.distributed costs in Python, and the memory that every
rank reads and writes; its others pass its messages. More ranks than cores share them: times ranks / cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from labs.collectives import overlap
from labs.collectives.calls import OURS, algorithm_of
from labs.collectives.config import FLOAT, SMALL_KIB, Config
from labs.collectives.ways import OPERATIONS, SWEEP, SWEEP_WAYS, more_group, ways_of
from labs.lab import Prediction
from labs.machine import Machine

IN_PLACE = ("reduce", "all_reduce")  # refilled before each call
PYTHON_CALLS = 8  # torch calls' worth of Python between dist.all_reduce and shared memory


def seconds(machine: Machine, operation: str, way: str, size: int, ranks: int) -> tuple[float, str]:
    """Seconds of one call on ``size`` bytes, and the formula with its numbers."""
    from parallel.collective_costs import cost

    crowd = max(1.0, ranks / machine.cores)
    text = f", x {crowd:g} for {ranks} ranks on {machine.cores} cores" if crowd > 1 else ""
    refill = 2 * size / machine.bandwidth(2 * size, threads=1) if operation in IN_PLACE else 0.0
    if way == "shm" and operation == "all_reduce":
        call = PYTHON_CALLS * machine["torch_call_s"]
        # Copied in (read, write), all ranks' read, the sum written; by every rank.
        moved = ranks * (3 + ranks) * size
        rate = machine.bandwidth(moved, threads=0)
        because = f"{PYTHON_CALLS} torch calls + {moved:.3g} B at {rate / 1e9:.1f} GB/s{text}"
        return crowd * (call + moved / rate) + refill, because
    link = "shm" if way == "shm" else "gloo"
    latency, per_byte = machine[f"{link}_message_s"], machine[f"{link}_s_per_byte"]
    algorithm = algorithm_of(way) or ("ring" if operation == "all_reduce" else None)
    value = cost(operation, size, ranks, latency, per_byte, algorithm)
    because = (
        f"{algorithm or 'cheapest'} of {size} B on {ranks} ranks at {1e6 * latency:.0f} us a message and "
        f"{1e9 * per_byte:.2g} ns/B{text}{' + refilling it' if refill else ''}"
    )
    return crowd * value + refill, because


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
    "gloo": "gloo's threads: how soon the system wakes them, which a busy machine delays",
    "shm": "a rank that is not on a core: shared memory spins briefly, yields, then sleeps",
    "ours": "Python for each message, which a single ping-pong does not need",
}


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    parts = (_collectives, _sizes, _more_ranks, _overlap)
    return [found for part in parts for found in part(config, machine)]


def memory_bytes(config: Config) -> float:
    """Every rank's copies of the largest vector, shm's segments, and torch itself."""
    ranks = max(config.ranks, config.more_ranks)
    return ranks * (8 * 1024.0 * max(config.large_KiB, config.size_KiB) + 12.0 * config.width**2 + 3e8)
