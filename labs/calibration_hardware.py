"""What the silicon can do: arithmetic peaks, bandwidth curves, page faults. Used by ``labs.calibration``.

Limits are the best of several short runs, since a busy machine only ever makes things slower; costs are
medians (``typical``), because a prediction is held against a median. Compilations are too long for a median:
of a few the least counts (``calibration_compilers``).
"All cores" is Python threads that run code without the GIL, each on its own memory, which it touched
first itself (on several sockets a page lives where it was first touched). The time of a run goes from
the first start to the last end.
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from labs.machine import Curve, affinity

KIBI, MEBI, GIBI = 2**10, 2**20, 2**30
COARSE = 64 * MEBI  # larger working sets are fewer: their runs are long
RUN_SECONDS = 0.002  # of one timed run: long against a wake-up, short against a scheduler's time slice
RATE_SECONDS = 0.08  # of all runs of one rate, where they are long
RETIMED_SECONDS = 0.04
"""A first try that takes less is timed again. One that was interrupted would pass for long work, and so few
iterations be timed that calling them is most of it: a matrix unit was so found 40 times too slow."""
Work = Callable[[int], object]
"""Runs without the GIL for a given number of iterations."""
Figures = dict[str, tuple[float, str]]
"""name -> (value, source)"""


def best(step: Callable[[], object], runs: int = 7) -> float:
    """Seconds of the fastest of ``runs`` calls, after one untimed."""
    step()
    seconds = math.inf
    for _ in range(runs):
        start = time.perf_counter()
        step()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


RUNS = 15  # of which a cost is the median; fewer where it is measured again


def typical(step: Callable[[], object], runs: int = RUNS) -> float:
    """Median seconds of ``runs`` calls, after one untimed.

    The interpreter's speed has more than one mode (the same loop took 8.5 or 13 ns an operation on one
    machine, from call to call): the fastest call is not what programs get.
    """
    step()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def pin(place: int) -> None:
    """Keep the calling thread on the ``place``-th usable core, where the system can.

    Next to a busy process the scheduler may leave two threads on one core for seconds.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(affinity())
        os.sched_setaffinity(0, {cores[place % len(cores)]})


def together(works: Sequence[Work], iterations: int, runs: int = 5) -> float:
    """Seconds of the fastest of ``runs`` in which every thread does ``iterations`` of its own work, after one
    that is not timed; infinite where there is no other."""
    if len(works) == 1:
        return best(lambda: works[0](iterations), runs)
    barrier = threading.Barrier(len(works), timeout=60)
    spans: list[list[tuple[float, float]]] = [[] for _ in works]
    failures: list[BaseException] = []

    def worker(place: int) -> None:
        try:
            pin(place)
            for _ in range(runs + 1):
                barrier.wait()
                start = time.perf_counter()
                works[place](iterations)
                spans[place].append((start, time.perf_counter()))
        except BaseException as error:
            failures.append(error)
            barrier.abort()  # the others must not wait for this one

    threads = [threading.Thread(target=worker, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if failures or any(thread.is_alive() for thread in threads):
        reason = failures[0] if failures else "not finished within 120 s"
        raise RuntimeError(f"a calibration thread failed: {reason!r}")
    rounds = list(zip(*spans, strict=True))[1:]
    spans_s = (max(end for _, end in span) - min(start for start, _ in span) for span in rounds)
    return min(spans_s, default=math.inf)


def _timed(work: Work, iterations: int) -> float:
    start = time.perf_counter()
    work(iterations)
    return time.perf_counter() - start


def rate(works: Sequence[Work], amount: float, seconds: float = RUN_SECONDS, runs: int = 5) -> float:
    """Units per second of all works together, where one iteration of one work is ``amount`` units.

    Of ``runs`` as many as fit RATE_SECONDS, at least 3: a copy of a gigabyte is long against any disturbance.
    """
    iterations = 1
    while True:
        elapsed = _timed(works[0], iterations)
        if seconds / 4 <= elapsed < RETIMED_SECONDS:
            elapsed = min(elapsed, _timed(works[0], iterations))
        if elapsed >= seconds / 4:
            break
        iterations *= 4 if elapsed * 8 < seconds else 2
    seconds += 1e-4 * (len(works) - 1)  # waking many threads takes longer, and is part of the time
    each = elapsed / iterations
    iterations = max(1, round(seconds / each))
    runs = min(runs, max(3, int(RATE_SECONDS / (each * iterations))))
    return amount * iterations * len(works) / together(works, iterations, runs)


# --- arithmetic ------------------------------------------------------------------------------------


def peaks(cores: int) -> Figures:
    """FLOP/s of vector and matrix units, one core and all; the latency of an FMA and of an addition; packed
    loops."""
    from kernels import peaks as kernel
    from kernels.peaks_matrix import matrix_bfloat16

    width = f"{kernel.BITS}-bit registers"
    figures: Figures = {"vector_lanes_float32": (float(kernel.LANES32), f"LLVM's host features: {width}")}
    units: list[tuple[str, Work, int, str]] = [
        ("vector_float32", kernel.fma32, kernel.FLOPS_FMA32, f"{kernel.CHAINS} chains of FMA, {width}"),
        ("vector_float64", kernel.fma64, kernel.FLOPS_FMA64, f"{kernel.CHAINS} chains of FMA, {width}"),
    ]
    matrix = matrix_bfloat16()
    if matrix:
        work, flops, name = matrix
        units.append(("matrix_bfloat16", work, flops, f"independent {name}, operands in registers"))
    kernel.fma32(20_000_000)  # the clock needs some milliseconds of work to rise
    for name, work, flops, source in units:
        for suffix, threads in (("1", 1), ("all", cores)):
            value = rate([work] * threads, flops, runs=25)
            figures[f"{name}_{suffix}_flops"] = (value, f"{source}, {threads} thread(s)")
    figures["scalar_float32_flops"] = (
        rate([kernel.fma_scalar], kernel.FLOPS_SCALAR),
        f"{kernel.CHAINS} chains of FMA on single floats, 1 thread",
    )
    figures["fma_latency_s"] = (
        1 / rate([kernel.fma_latency], 1),
        "one chain of scalar float32 FMA, each needing the last",
    )
    figures["add_latency_s"] = (
        1 / rate([kernel.add_latency], 1),
        "one chain of scalar float32 additions, each needing the last",
    )
    return figures | packed()


def packed(count: int = 4096) -> Figures:
    """Compiled loops of one thread on full registers, whose data are in the nearest cache."""
    from kernels import peaks as kernel

    with Buffer(4 * count) as source, Buffer(4 * count) as target:
        kernel.fill(source.floats, 1)
        found = {
            name: 1 / rate([partial(work, target.floats, source.floats)], count)
            for name, work in (("exp", kernel.packed_exp), ("division", kernel.packed_division))
        }
    return {
        "packed_exp_s": (found["exp"], f"exp of {count} float32 by packed arithmetic, per element"),
        "packed_division_s": (
            found["division"],
            f"1.5 / x of {count} float32 in full registers, per element",
        ),
    }


def vector_rate() -> float:
    """FLOP/s of one core's vector units, in some milliseconds."""
    from kernels import peaks as kernel

    return rate([kernel.fma32], kernel.FLOPS_FMA32, seconds=0.01)


# --- memory ----------------------------------------------------------------------------------------


class Buffer:
    """Page-aligned anonymous memory in ordinary pages, filled with random float32.

    Ordinary pages, because that is what malloc, and with it torch, gives; numpy asks for huge ones.
    Used as a context; the memory goes back to the system at its end.
    """

    def __init__(self, size_bytes: int) -> None:
        import numpy

        self.memory = _anonymous(max(size_bytes, mmap.PAGESIZE))
        self.floats: Any = numpy.frombuffer(self.memory, numpy.float32)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *unused: object) -> None:
        del self.floats
        self.memory.close()


def _anonymous(size_bytes: int) -> mmap.mmap:
    """Private memory, as malloc maps it; Python's own default is shared, whose faults cost twice as much."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size_bytes)
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _sizes(smallest: int, largest: int) -> list[int]:
    """Twice as large each, past COARSE four times; the last is the largest that doubling reaches."""
    sizes = [smallest]
    while (next_size := sizes[-1] * 2) <= largest:
        sizes.append(
            min(2 * next_size, largest // next_size * next_size) if next_size > COARSE else next_size
        )
    return sizes


def largest_working_set(l3_bytes: float, memory_bytes: float) -> int:
    """Four times the last-level cache, at most an eighth of memory and 2 GiB."""
    return int(min(4 * max(l3_bytes, 32 * MEBI), memory_bytes / 8, 2 * GIBI))


def curves(cores: int, largest: int, smallest: int = 16 * KIBI) -> dict[str, Curve]:
    """Bandwidth of ``copy`` and ``read`` over the working set, for one thread and for all cores.

    A copy of n bytes to n others has a working set of 2 n and moves 2 n; that a plain store first
    fetches the line it overwrites is thereby inside the figure. For all cores, the working set is the
    sum over the threads.
    """
    found: dict[str, Curve] = {}
    for threads, suffix in ((1, "1"), (cores, "all")):
        if threads == 1 and suffix == "all":
            found["copy_all"], found["read_all"] = found["copy_1"], found["read_1"]
            break
        sizes = _sizes(smallest * threads, max(largest, smallest * threads))
        points = bandwidths(threads, sizes)
        for kind in ("copy", "read"):
            found[f"{kind}_{suffix}"] = Curve(tuple(sizes), tuple(points[kind]))
    return found


def bandwidths(threads: int, sizes: Sequence[int], runs: int = 9) -> dict[str, list[float]]:
    """Bytes per second of ``copy`` and ``read`` by ``threads`` threads at each total working set."""
    from contextlib import ExitStack

    from kernels import peaks as kernel

    grain = 2 * kernel.STREAMS * kernel.LANES32
    with ExitStack() as stack:
        buffers = [stack.enter_context(Buffer(sizes[-1] // threads)) for _ in range(threads)]
        together([partial(_fill, buffer.floats, seed) for seed, buffer in enumerate(buffers)], 1, runs=0)
        found: dict[str, list[float]] = {"copy": [], "read": []}
        for size in sizes:
            count = size // threads // 4 // grain * grain
            half = count // 2
            parts = [(b.floats[:half], b.floats[half:count], b.floats[:count]) for b in buffers]
            copies = [partial(kernel.copy, target, source) for target, source, _ in parts]
            reads = [partial(kernel.read, whole) for *_, whole in parts]
            found["copy"].append(rate(copies, count * 4, runs=runs))
            found["read"].append(rate(reads, count * 4, runs=runs))
            del parts, copies, reads  # a buffer can only be given back when nothing looks into it
        return found


def _fill(values: Any, seed: int, iterations: int) -> None:
    from kernels import peaks as kernel

    kernel.fill(values, seed)


def page_faults(cores: int, size_bytes: int = 32 * MEBI) -> Figures:
    """Seconds per byte of fresh anonymous memory: mapping it, the first touch, giving it back. In pages as
    they come, and in the huge ones that our kernels ask for where the system has them."""
    import torch

    from kernels import peaks as kernel
    from kernels.fresh_memory import huge_page_bytes, in_huge_pages

    def touch(place: int, part: Any) -> None:
        pin(place)
        kernel.touch(part)

    def life(threads: int, huge: bool) -> float:
        start = time.perf_counter()
        with _anonymous(size_bytes) as memory:
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            whole = (in_huge_pages(tensor) if huge else tensor).numpy()
            share = size_bytes // threads // kernel.PAGE_BYTES * kernel.PAGE_BYTES
            parts = [whole[place * share : (place + 1) * share] for place in range(threads)]
            if threads == 1:
                kernel.touch(parts[0])
            else:
                workers = [threading.Thread(target=touch, args=item) for item in enumerate(parts)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                del workers
            del parts, whole, tensor
        return time.perf_counter() - start

    figures: Figures = {}
    for pages in ("page", *(["huge_page"] if huge_page_bytes() else [])):
        for suffix, threads in (("", 1), ("_all", cores)):
            huge = pages == "huge_page"
            life(threads, huge)
            seconds = statistics.median(life(threads, huge) for _ in range(12))
            figures[f"{pages}_fault{suffix}_s_per_byte"] = (
                seconds / size_bytes,
                f"mmap, first touch of each {kernel.PAGE_BYTES} bytes by {threads} thread(s), munmap of "
                f"{size_bytes // MEBI} MiB" + " in huge pages" * huge,
            )
    return figures
