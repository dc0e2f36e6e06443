"""What the workers run: small functions of a module that imports next to nothing.

A worker process imports this module to find its task, so its imports are part of every start-up that
the lab measures: only the standard library here, NumPy where a task needs it.

Every kind of compute does the same arithmetic, the logistic map ``x <- 3.9 * x * (1 - x)``: chaotic
(an iteration more or less, or another order of operations, changes every digit), and nothing can be
skipped. So "every way computes the same" can be checked to the last bit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

START = 0.4
RATE = 3.9


def python_work(iterations: int, start: float = START) -> float:
    """``iterations`` times three float operations in the interpreter: holds the GIL throughout."""
    x, rate = start, RATE
    for _ in range(iterations):
        x = rate * x * (1.0 - x)
    return x


def numpy_work(iterations: int, elements: int, start: float = START) -> float:
    """The same map on ``elements`` float64 at once: NumPy releases the GIL inside each of its calls."""
    import numpy as np

    x = np.full(elements, start)
    scaled = np.empty_like(x)
    for _ in range(iterations):
        np.multiply(x, RATE, out=scaled)
        np.subtract(1.0, x, out=x)
        np.multiply(scaled, x, out=x)
    return float(x[-1])


def wait(seconds: float) -> float:
    """A blocking read that takes this long; a sleep releases the GIL exactly as a read does."""
    time.sleep(seconds)
    return seconds


def nothing(item: int) -> int:
    """The smallest task: what remains is what it costs to hand it over."""
    return item


def echo(payload: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
    """Some Python work on a payload that comes back with the result."""
    return python_work(iterations, float(payload[0])), payload


def negated(payload: np.ndarray) -> np.ndarray:
    """A new array of the payload's size: both ways have something to carry."""
    return -payload


def negate_shared(name: str, elements: int) -> int:
    """Negates a float32 array in place in the shared segment ``name``: only the name was sent."""
    import numpy as np

    array = np.ndarray(elements, np.float32, _attached(name).buf)
    np.negative(array, out=array)
    return elements


_segments: dict[str, Any] = {}


def _attached(name: str) -> Any:
    from multiprocessing import shared_memory

    if name not in _segments:  # mapped once a worker, as a program would; unmapped when it exits
        _segments[name] = shared_memory.SharedMemory(name)
    return _segments[name]


def slices(count: int, iterations: int) -> list[tuple[float, float]]:
    """Begin and end of ``count`` pieces of Python work, on CLOCK_MONOTONIC: one clock for a whole host.

    The one place of the lab that reads a clock itself: it runs in workers, which have no recorder.
    """
    stamps = []
    for _ in range(count):
        begin = time.perf_counter()
        python_work(iterations)
        stamps.append((begin, time.perf_counter()))
    return stamps


def hello(seconds: float) -> int:
    """The worker's process number, after a pause that lets the others take one too."""
    time.sleep(seconds)
    return os.getpid()


def prepare(modules: tuple[str, ...] = ()) -> None:
    """A worker's first act: see that it cannot outlive its parent, then import what its tasks need."""
    die_with_parent()
    from importlib import import_module

    for module in modules:
        import_module(module)


def die_with_parent() -> None:
    """Ends this process when the one that asked for it dies, even by ``kill -9``.

    A ProcessPoolExecutor's worker waits on a pipe whose other end it holds itself, so it would wait
    forever. On Linux the kernel sends a signal when the parent dies (``prctl(PR_SET_PDEATHSIG)``, prctl(2)).
    A forkserver's child needs more: its parent is the server, and each child holds open the very pipe whose
    end would tell the server to leave, so neither would go. There a thread watches the process that asked.
    """
    import multiprocessing

    asked = multiprocessing.parent_process()
    if sys.platform == "linux" and (asked is None or asked.pid == os.getppid()):
        import ctypes
        import signal

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1: PR_SET_PDEATHSIG
        if asked is not None and not asked.is_alive():  # it died before the line above
            os._exit(1)
    elif asked is not None:
        threading.Thread(target=_leave_after, args=(asked,), daemon=True).start()


def _leave_after(asked: Any) -> None:
    asked.join()
    os._exit(1)
