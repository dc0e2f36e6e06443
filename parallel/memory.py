"""The bytes that are really live on a rank, counted at torch's allocator.

``tracked()`` counts storages when they are allocated and freed, not the process's resident memory: buffers
that kernels make for themselves and those of backward threads count, the interpreter and the allocator's own
reserve do not. On CUDA devices torch keeps these figures itself. On CPUs its allocator can report to the
profiler; one exported switch (c10/core/CPUAllocator.cpp, ProfiledCPUMemoryReporter) makes it also remember
the size of every block from then on, whoever frees it, in whatever thread. Importing this module sets the
switch, for the life of the process (about 0.5 us per allocation and freeing: a small operation takes twice as
long). Import it where memory is counted, and there before the model is built: of a block that is older than
the switch the freeing goes unnoticed.

Memory that is not torch's (numpy arrays, gloo's own buffers, shared segments) is not seen.
"""

import contextlib
import ctypes
import gc
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile


class Tracker:
    """What ``tracked()`` found, relative to its start. peak_bytes: the most that was live at once, at least
    0; live_bytes: what was live at the end (negative: more was freed than allocated). Set when the context
    ends."""

    peak_bytes: int
    live_bytes: int


@contextlib.contextmanager
def tracked(device: torch.device | str = "cpu") -> Iterator[Tracker]:
    """Count the bytes of torch's storages on ``device`` (a CPU or CUDA device) that come and go meanwhile.

    Everything counts that the process allocates, in all threads. On the CPU the block is profiled, which may
    double the time of small operations: count one step, time another. ValueError: another kind of device;
    RuntimeError: a profiler is running already.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"memory is tracked on cpu and cuda devices, not on {device}")
    gc.collect()  # what is garbage already shall not be freed, and so counted, at some moment in between
    with _tracked_cpu() if device.type == "cpu" else _tracked_cuda(device) as tracker:
        yield tracker


@contextlib.contextmanager
def _tracked_cuda(device: torch.device) -> Iterator[Tracker]:
    tracker = Tracker()
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield tracker
    finally:
        tracker.peak_bytes = torch.cuda.max_memory_allocated(device) - start
        tracker.live_bytes = torch.cuda.memory_allocated(device) - start


@contextlib.contextmanager
def _tracked_cpu() -> Iterator[Tracker]:
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError("a profiler is running already in this thread; memory cannot be tracked beside it")
    if not _SWITCHED_ON:
        warnings.warn(
            "this build of torch hides its allocator's switch: what threads free is missed", stacklevel=4
        )
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would tell stderr of each start and stop
    tracker, profiler = Tracker(), profile(use_device=None, profile_memory=True)
    try:
        with profiler:
            mark = torch.empty(
                1, dtype=torch.uint8
            )  # the first event says what is live at the start, and a byte
            try:
                yield tracker
            finally:
                del mark  # the last event: what is live at the end
    finally:
        events = list(_allocations(profiler.kineto_results.experimental_event_tree()))
        totals = [total for _, total in sorted(events, key=lambda event: event[0])]
        tracker.peak_bytes = max(totals[:-1]) - totals[0]
        tracker.live_bytes = totals[-1] - (totals[0] - 1)


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes live on the CPU after it) of each allocation and freeing, in the order of each thread."""
    for event in events:
        if event.tag.name == "Allocation" and event.typed[1].device.type == "cpu":
            yield event.start_time_ns, event.typed[1].total_allocated
        yield from _allocations(event.children)


def _switch_on() -> bool:
    """Make the CPU allocator remember every block it gives; False where this build hides the switch."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
    except (OSError, ValueError):
        return False
    return True


_SWITCHED_ON = _switch_on()
