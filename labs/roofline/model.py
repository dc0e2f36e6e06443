"""The formula: time = call + max(FLOPs / peak, bytes / bandwidth at this working set) + page faults.

CPU. A byte that is read costs 1 / read bandwidth. A byte that is written costs 2 / copy bandwidth less
that: a copy is one of each, and its store first fetches the line it overwrites. Both rates are taken from
the measured curve at the operation's working set. Work is split over as many threads as torch can use; the
rate of some of the cores is that many single ones, up to what all reach.

Page faults. Under glibc's default allocator a block of 32 MiB or more comes fresh from the system at every
call (mallopt(3), M_MMAP_THRESHOLD: the dynamic threshold ends at 32 MiB). The kernel zeroes each page
before the store, so the page is in the cache by then: writing costs the fault and nothing beside it. Our
kernels ask for huge pages (``kernels.fresh_memory``), of which a byte costs less.

GPU. Launch + max(FLOPs / peak, bytes / memory bandwidth), data on the device.

Source: S. Williams, A. Waterman, D. Patterson, Roofline, Communications of the ACM 52(4), 2009, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

from labs.machine import MMAP_THRESHOLD_BYTES, Machine
from labs.roofline.operations import Operation
from labs.wording import duration


def cores_rate(one: float, everyone: float, threads: int, cores: int) -> float:
    """Rate of ``threads`` of ``cores``, from the rates of one and of all."""
    if threads == 1:
        return one
    return everyone if threads >= cores else min(everyone, threads * one)


def byte_costs(machine: Machine, working_set: float, threads: int) -> tuple[float, float]:
    """Seconds per byte read and per byte written over this working set."""
    rates = {}
    for kind in ("read", "copy"):
        one = machine.bandwidth(working_set / threads, kind=kind, threads=1)
        everyone = machine.bandwidth(working_set, kind=kind, threads=0)
        rates[kind] = cores_rate(one, everyone, threads, machine.cores)
    read = 1 / rates["read"]
    return read, max(2 / rates["copy"] - read, read)  # a store is no cheaper than a load


def cpu_seconds(operation: Operation, machine: Machine, ours: bool = False) -> tuple[float, str]:
    """Seconds of one call on the CPU, of torch's operation or of ours, and the formula with its numbers."""
    threads = min(machine.cores, operation.pieces or machine.cores)
    dtype = operation.dtype if _has(machine, operation) else "float32"
    one, everyone = (machine.peak(dtype, unit=operation.unit, threads=count) for count in (1, 0))
    peak = cores_rate(one, everyone, threads, machine.cores)
    # An instruction slot could have been an FMA, which is two operations of the peak.
    compute = (2 * operation.slots or operation.flops) / peak
    read, write = byte_costs(machine, operation.bytes_moved, threads)
    faulting = machine.allocator == "default" and operation.writes >= MMAP_THRESHOLD_BYTES
    memory = operation.reads * read + (0.0 if faulting else operation.writes * write)
    overhead = machine["torch_call_s"]
    if threads > 1:
        overhead += machine.get("torch_parallel_region_s") or 0.0
    total = overhead + max(compute, memory)
    limit = "compute" if compute >= memory else "memory"
    because = (
        f"{duration(overhead)} call + max({duration(compute)} compute at {peak / 1e9:.0f} GFLOP/s, "
        f"{duration(memory)} for {operation.bytes_moved / 1e6:.3g} MB) on {threads} thread(s): {limit}"
    )
    if faulting:
        name = "page_fault_all_s_per_byte" if threads > 1 else "page_fault_s_per_byte"
        huge = f"huge_{name}" if ours else ""
        faults = operation.writes * machine[huge if huge in machine.constants else name]
        total += faults
        because += f" + {duration(faults)} of page faults"
    return total, because


def _has(machine: Machine, operation: Operation) -> bool:
    """Whether the machine computes the dtype at all; else float32 stands in, after conversion."""
    return any(
        f"{unit}_{operation.dtype}_1_flops" in machine.constants for unit in (operation.unit, "vector")
    )


def gpu_seconds(operation: Operation, gpu: Machine) -> tuple[float, str]:
    """Seconds of one call on a GPU with the data in its memory, and the formula with its numbers."""
    peak = gpu.peak(operation.dtype, unit=operation.unit, threads=0)
    compute = (2 * operation.slots or operation.flops) / peak
    memory = operation.bytes_moved / gpu.bandwidth(operation.bytes_moved, threads=0)
    launch = gpu["launch_s"]
    because = (
        f"{duration(launch)} launch + max({duration(compute)} compute at {peak / 1e12:.3g} TFLOP/s, "
        f"{duration(memory)} for {operation.bytes_moved / 1e6:.3g} MB)"
    )
    return launch + max(compute, memory), because


def transfer_seconds(operation: Operation, gpu: Machine) -> float:
    """Seconds to bring the inputs to the GPU and the output back, over its link to the host."""
    return operation.bytes_moved / gpu["transfer_bytes_per_second"]


def crossover(
    family: Callable[[int], Operation], machine: Machine, gpu: Machine, with_transfer: bool = False
) -> float | None:
    """The smallest size from which the GPU's predicted time stays below the CPU's, or None.

    ``family`` gives the operation at a size; sizes go up by a tenth to 2^28. with_transfer: the data comes
    from and returns to the host.
    """
    wins: float | None = None
    size = 1.0
    while size <= 2**28:
        operation = family(round(size))
        there = gpu_seconds(operation, gpu)[0] + (transfer_seconds(operation, gpu) if with_transfer else 0.0)
        here = cpu_seconds(operation, machine)[0]
        wins = None if there >= here else wins or size
        size = max(size * 1.1, size + 1)
    return wins
