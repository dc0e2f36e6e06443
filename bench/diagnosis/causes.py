"""A cause a function: from the facts of a profile to what it costs, why one thinks so, and what to try.

``share`` is the part of the time that would go if the cause went, as an estimate: a fix may bring a cost of
its own, or mend more than the one cause. Of ``memory_capacity`` it is the part of the room that a step takes,
which foretells no gain of time. A rule that does not apply returns None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.diagnosis.facts import Facts
from bench.report.units import format_quantity

TIME, ROOM = "time", "room in memory"
LEAST = 0.2
"""Of the time: what costs less is no bottleneck, whatever it is."""
FULL = 0.75
"""Of the room: a step that takes more leaves none for a larger batch."""
FASTER = 1.3
"""A type whose peak is not higher by so much is not worth its rounding."""
MOST = 4.0
"""Times faster that products of a training job become in a 16-bit type, however far apart the peaks are:
matrix units are fed from memory. Measured on a CPU whose peaks are 14.6 apart: 3.7."""
COLD = 1.7
"""A page fault costs the kernel's time, and as measured some more in the program that touches the page: what
the kernel has just cleared is in no cache."""
TYPICAL_PASSES = 5.0
"""Operations that one fused operation replaces, so that of their time a fifth remains: GELU five, a norm
eight, attention's softmax six, AdamW ten."""


@dataclass(frozen=True)
class Evidence:
    """cause: one of ``CAUSES``. share: in 0 to 1, of what ``of`` says: time or memory. because: sentences
    with figures and units. attempts: what to try."""

    cause: str
    share: float
    because: tuple[str, ...]
    attempts: tuple[str, ...]
    of: str = TIME

    @property
    def gain(self) -> float | None:
        """How many times faster without it, about (Amdahl 1967); None of what takes no time."""
        return 1.0 / (1.0 - min(self.share, 0.99)) if self.of == TIME else None


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _where(facts: Facts) -> str:
    places = facts.places
    return f"; the program stood in {places} of the samples" if places else ""


def input_(facts: Facts) -> Evidence | None:
    text = f"{percent(facts.input)} of the time the loop waits for its next batch{_where(facts)}"
    tries = (
        "read ahead: DataLoader(num_workers=..., prefetch_factor=...), or a thread that fills a queue",
        "prepare once and keep: decode and tokenise beforehand, memory-map the result",
    )
    return Evidence("input", facts.input, (text,), tries)


def python(facts: Facts) -> Evidence | None:
    text = f"{percent(facts.gaps)} of the time no operator runs for long stretches{_where(facts)}"
    tries = (
        "move loops over numbers into operations on tensors, or numba",
        "do what the step does not need (logging, metrics) less often, or in another thread",
    )
    return Evidence("python", facts.gaps * _users(facts), (text,), tries)


def _users(facts: Facts) -> float:
    """Of a host's CPU seconds those that are not the kernel's: page faults, and memory that is given back,
    have a cause of their own."""
    return 1.0 if facts.on_device or facts.system is None else 1.0 - min(facts.system, 1.0)


def dispatch(facts: Facts) -> Evidence | None:
    share = facts.calls + facts.launches if facts.on_device else facts.calling
    text = (
        f"{percent(share)} of the time goes into calling operators: "
        f"{format_quantity(facts.operators_per_s, 'operators/s')}, {percent(facts.small)} of the "
        f"time in ones "
        f"of less than 20 us, {percent(facts.calls + facts.launches)} between them"
    )
    tries = (
        "larger batches, or fewer and longer pieces of one",
        "torch.compile (CUDA: mode='reduce-overhead', graphs); fused or foreach optimizers",
    )
    return Evidence("dispatch", share, (text,), tries)


def allocator(facts: Facts) -> Evidence | None:
    if facts.faults_per_s is None or facts.system is None or facts.on_device:
        return None
    # The kernel's seconds may be another matter's; those of so many faults are known where the machine is.
    kernel = min(facts.system, facts.fault_share if facts.fault_share is not None else facts.system)
    share = min(COLD * kernel, 1.0)
    text = (
        f"{format_quantity(facts.faults_per_s, 'page faults/s')} of CPU time; "
        f"{percent(facts.system)} of the CPU "
        "seconds are the kernel's: freed memory goes back to the system and is faulted in again"
    )
    tries = (
        "keep freed memory: GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:"
        "glibc.malloc.tcache_count=0, or jemalloc/tcmalloc by LD_PRELOAD; "
        "unset MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_",
        "no malloc_trim(0) in the loop: what it gives back the next operation asks for",
        "write into tensors that are there: out=, in-place operations, "
        "optimizer.zero_grad(set_to_none=False)",
    )
    return Evidence("allocator", share, (text,), tries)


def memory_bandwidth(facts: Facts) -> Evidence | None:
    share = facts.pointwise * (1.0 - 1.0 / TYPICAL_PASSES) * _users(facts)
    text = (
        f"{percent(facts.pointwise)} of the time is in operations that pass over memory and compute next to "
        f"nothing, {percent(facts.products)} in products of matrices; fused, about a fifth would remain"
    )
    tries = (
        "fused operations: scaled_dot_product_attention, layer_norm, gelu, cross_entropy; AdamW(fused=True)",
        "torch.compile, which fuses chains of operations; perflab's kernels",
    )
    return Evidence("memory_bandwidth", share, (text,), tries)


def memory_capacity(facts: Facts) -> Evidence | None:
    if facts.memory is None or facts.memory_B is None or facts.memory_limit_B is None:
        return None
    text = (
        f"{'the process grew by' if facts.memory_grown else 'a step takes'} "
        f"{format_quantity(facts.memory_B, 'B')}, {percent(facts.memory)} of what is left of a limit of "
        f"{format_quantity(facts.memory_limit_B, 'B')}"
    )
    tries = (
        "compute activations again instead of keeping them: torch.utils.checkpoint",
        "scaled_dot_product_attention, which keeps no scores; smaller pieces with accumulated gradients; "
        "ZeRO or FSDP over ranks",
    )
    return Evidence("memory_capacity", min(facts.memory, 1.0), (text,), tries, ROOM)


def compute_precision(facts: Facts) -> Evidence | None:
    if facts.faster is None or facts.faster < FASTER:
        return None
    share = facts.wide_products * (1.0 - 1.0 / min(facts.faster, MOST))
    text = (
        f"{percent(facts.wide_products)} of the time multiplies matrices in float32 or float64, at "
        f"{format_quantity(facts.flops_per_s, 'FLOP/s')}; the peak of a 16-bit type is {facts.faster:.1f}x "
        f"as high here"
    )
    tries = (
        "torch.autocast(device, torch.bfloat16), with parameters in float32",
        "on CUDA also torch.set_float32_matmul_precision('high') (TF32)",
    )
    return Evidence("compute_precision", share, (text,), tries)


def transfer_synchronization(facts: Facts) -> Evidence | None:
    if not facts.on_device:
        return None
    share = facts.waits + facts.copies
    text = (
        f"{percent(facts.waits)} of the time the device is idle after the host has waited for it, "
        f"{percent(facts.copies)} it only copies"
    )
    tries = (
        "no .item(), .cpu(), print(tensor) or nonzero() in the loop: keep figures on the device, "
        "read them rarely",
        "pinned memory and .to(device, non_blocking=True), one step ahead on a stream of its own",
    )
    return Evidence("transfer_synchronization", share, (text,), tries)


def communication(facts: Facts) -> Evidence | None:
    if facts.ranks < 2 and not facts.exposed:
        return None
    share = max(0.0, facts.exposed - _waited(facts))
    text = (
        f"{percent(facts.exposed)} of the time ranks only communicate, without what they wait for a late one "
        f"{percent(share)}"
    )
    tries = (
        "exchange in buckets while backward runs (DistributedDataParallel), once a step (no_sync)",
        "fewer bytes: bfloat16 gradients, local SGD; a faster backend (perflab run collectives)",
    )
    return Evidence("communication", share, (text,), tries)


def _waited(facts: Facts) -> float:
    """The mean over ranks of what they wait for the late one, who waits for nobody. Shared out evenly, its
    work takes the others just that long: so much of the time would go."""
    return facts.late * (1.0 - 1.0 / facts.ranks)


def straggler(facts: Facts) -> Evidence | None:
    if facts.late_rank < 0:
        return None
    text = (
        f"rank {facts.late_rank} is late: others wait {percent(facts.late)} of the time for it beyond what "
        f"all communicate; with equal shares {percent(_waited(facts))} would go"
    )
    tries = (
        "equal shares: batches of equal tokens, layers of equal cost",
        "look at that rank's core, clock, memory and neighbours (perflab trace on all ranks)",
    )
    return Evidence("straggler", _waited(facts), (text,), tries)


def oversubscription(facts: Facts) -> Evidence | None:
    if facts.threads is None or facts.cores is None or facts.threads <= facts.cores or facts.on_device:
        return None
    share = 1.0 - facts.cores / facts.threads
    if facts.switch_share is not None:  # threads that seldom take turns do no harm
        share = min(share, facts.switch_share)
    rate = facts.switches_per_s or 0.0
    text = (
        f"{facts.threads} threads compute on {facts.cores} cores; "
        f"{format_quantity(rate, 'switches of threads/s')} of CPU time"
    )
    tries = (
        "torch.set_num_threads or OMP_NUM_THREADS: the cores there are, divided by the ranks",
        "threads bound to cores (OMP_PROC_BIND=close), workers of DataLoader counted too",
    )
    return Evidence("oversubscription", share, (text,), tries)


RULES: tuple[Callable[[Facts], Evidence | None], ...] = (
    *(input_, python, dispatch, allocator, memory_bandwidth, memory_capacity, compute_precision),
    *(transfer_synchronization, communication, straggler, oversubscription),
)
CAUSES = tuple(rule.__name__.rstrip("_") for rule in RULES)
NONE = "none"
