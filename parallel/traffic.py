"""What this process communicates, counted: bytes and calls by operation, and the time it was blocked.

``parallel.link`` reports here; ``counted()`` (also ``link.counted()``) opens a count. Counts may be nested
and overlap: each sees all that happens while it is open, from every thread of the process.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch


class Traffic:
    """One count.

    payload: bytes by operation, as torch.distributed spells it ("all_reduce", "all_gather", "reduce_scatter",
        "broadcast", "reduce", "gather", "scatter", "all_to_all", "send"): of each call the larger of its
        input and its output, summed; in a group of one rank nothing. What a rank receives point to point is
        in ``received``, not here: it is the payload of another rank's send.
    calls: number of calls by operation, also of "recv" and "barrier".
    sent, received: bytes point to point.
    waited_seconds: time in which at least one thread of this process was blocked in communication: issuing
        it, or waiting for it. A thread that only does so for others does not count (``background``), and on a
        CUDA device a wait only orders streams and blocks nobody.
    """

    def __init__(self) -> None:
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.sent = 0
        self.received = 0
        self.waited_seconds = 0.0


_lock = threading.Lock()
_open: list[Traffic] = []
_blocked_threads = 0
_blocked_since = 0.0
_of_thread = threading.local()


def counting() -> bool:
    """Whether a count is open."""
    return bool(_open)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this process communicates on linked groups meanwhile."""
    traffic = Traffic()
    with _lock:
        _settle()
        _open.append(traffic)
    try:
        yield traffic
    finally:
        with _lock:
            _settle()
            _open[:] = [other for other in _open if other is not traffic]


def record(operation: str, size: int) -> None:
    """One call of ``operation`` with a payload of ``size`` bytes."""
    with _lock:
        for traffic in _open:
            traffic.calls[operation] += 1
            if operation == "recv":
                traffic.received += size
            elif size:
                traffic.payload[operation] += size
            if operation == "send":
                traffic.sent += size


@contextlib.contextmanager
def background() -> Iterator[None]:
    """This thread works for others, which wait for it if they must: its own waiting does not count inside."""
    _of_thread.background = True
    try:
        yield
    finally:
        _of_thread.background = False


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """The time inside counts as waiting; that of several threads at once counts once."""
    global _blocked_threads
    if getattr(_of_thread, "background", False):
        yield
        return
    with _lock:
        _settle()
        _blocked_threads += 1
    try:
        yield
    finally:
        with _lock:
            _settle()
            _blocked_threads -= 1


def _settle() -> None:
    """Book the blocked time up to now. Called with the lock held, before anything changes."""
    global _blocked_since
    now = time.perf_counter()
    if _blocked_threads:
        for traffic in _open:
            traffic.waited_seconds += now - _blocked_since
    _blocked_since = now


def count_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists; anything else has none."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.sparse_coo:
            return count_bytes([value._indices(), value._values()])
        return value.numel() * value.element_size()
    return sum(map(count_bytes, value)) if isinstance(value, (list, tuple)) else 0
