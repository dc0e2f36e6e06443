"""The logistic map in compiled code, holding the GIL or not. Imported only where a variant needs it."""

from __future__ import annotations

from numba import njit

from labs.concurrency.workers import RATE, START


def _logistic(iterations: int, start: float) -> float:
    x = start
    for _ in range(iterations):
        x = RATE * x * (1.0 - x)
    return x


_released = njit("float64(int64, float64)", nogil=True)(_logistic)
_held = njit("float64(int64, float64)")(_logistic)


def compiled_work(iterations: int, start: float = START) -> float:
    """Machine code that gives the GIL away for the whole call (``nogil=True``)."""
    return _released(iterations, start)


def compiled_work_with_gil(iterations: int, start: float = START) -> float:
    """The same machine code as numba compiles it by default: the GIL stays held for the whole call."""
    return _held(iterations, start)
