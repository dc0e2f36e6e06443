"""The variants: a group for each cause, with the fault planted and mended; and the healthy job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from labs.bottlenecks import allocator, device, faults, ranks
from labs.bottlenecks.config import Config
from labs.bottlenecks.faults import Plant
from labs.bottlenecks.job import Job, Run, no_bfloat16
from labs.lab import Recorder, Step, Variant

FAULT, FIXED = "fault", "fixed"
HEALTHY = "none/healthy"


@dataclass(frozen=True)
class Pair:
    """What is planted, and what mends it. missing: why it cannot be planted here, or an empty string."""

    fault: Plant
    fixed: Plant
    missing: Callable[[], str] = str


PAIRS = {
    "input": Pair(faults.slow_input, faults.prefetched_input),
    "python": Pair(faults.python_entropy, faults.tensor_entropy),
    "dispatch": Pair(faults.tiny_batches, faults.short_sequences),
    "allocator": Pair(faults.returned_memory, faults.healthy, allocator.missing),
    "memory_bandwidth": Pair(faults.unfused_operations, faults.healthy),
    "memory_capacity": Pair(faults.kept_activations, faults.recomputed_activations),
    "compute_precision": Pair(faults.float32_products, faults.healthy, no_bfloat16),
    "oversubscription": Pair(faults.many_threads, faults.a_thread_a_free_core),
}
"""Of one process."""
RANKED = {
    "communication": Pair(ranks.eager_exchange, ranks.late_exchange),
    "straggler": Pair(ranks.uneven_shares, ranks.even_shares),
}
"""Of several ranks."""
ON_DEVICE = {
    "transfer_synchronization": Pair(device.copies_and_reads, device.stays_on_device, device.missing),
}
"""Of one process and a CUDA device. No time is predicted: it is that of launches and copies, which are not
among the constants of a machine."""
GROUPS = (*PAIRS, *RANKED, *ON_DEVICE)


def setup_of(plant: Plant) -> Callable[[Config, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        job = Job(config)
        try:
            plant(job)
            return Run(job)
        except BaseException:
            job.close()  # else the process would never be as it was before
            raise

    return setup


def variants(config: Config) -> Sequence[Variant]:
    from labs.models.formulas import flops_per_token

    common: dict[str, Any] = {"profiled": config.profiled}
    flops = float(flops_per_token(config.gpt(), config.length) * config.tokens)
    found = [Variant("none", "healthy", setup_of(faults.healthy), flops=flops, **common)]
    for group, pair in (PAIRS | RANKED | ON_DEVICE).items():
        processes = config.ranks if group in RANKED else 1
        reason = pair.missing()
        for name, plant in ((FAULT, pair.fault), (FIXED, pair.fixed)):
            found.append(
                Variant(
                    group,
                    name,
                    setup_of(plant),
                    threads=0 if group == "oversubscription" else 1,
                    processes=processes,
                    clock="cuda" if group in ON_DEVICE else "host",
                    unavailable=reason,
                    **common,
                )
            )
    return found
