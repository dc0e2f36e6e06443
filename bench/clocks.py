"""Clocks that wait for the work they time.

A step that only enqueues work (CUDA kernels, JAX's asynchronous dispatch) returns long before the work is
done: 7 microseconds were once read for 24 milliseconds of JAX. Each clock here times one *sample*: the
step called ``iterations`` times, divided by that number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

Step = Callable[[], object]


class Clock(Protocol):
    def sample(self, step: Step, iterations: int) -> float:
        """Seconds of one call of ``step``, averaged over ``iterations`` calls in a row."""

    def wait(self, output: object) -> None:
        """Return when the work behind ``output`` is done."""


class HostClock:
    """For work that is done when the step returns."""

    def sample(self, step: Step, iterations: int) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        return (time.perf_counter() - start) / iterations

    def wait(self, output: object) -> None:
        return


class JaxClock:
    """Waits for the returned arrays once, after the last call: waiting at every call would distort."""

    def sample(self, step: Step, iterations: int) -> float:
        import jax

        start = time.perf_counter()
        for _ in range(iterations):
            output = step()
        jax.block_until_ready(output)
        return (time.perf_counter() - start) / iterations

    def wait(self, output: object) -> None:
        import jax

        jax.block_until_ready(output)


class CudaClock:
    """torch CUDA events on the current stream: the device's own time, free of launch jitter."""

    def sample(self, step: Step, iterations: int) -> float:
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(iterations):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / iterations

    def wait(self, output: object) -> None:
        import torch

        torch.cuda.synchronize()


CLOCKS: dict[str, type[Clock]] = {"host": HostClock, "jax": JaxClock, "cuda": CudaClock}


def clock(name: str) -> Clock:
    if name not in CLOCKS:
        raise ValueError(f"there is no clock {name!r}; there is {', '.join(CLOCKS)}")
    return CLOCKS[name]()
