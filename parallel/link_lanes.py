"""A slow link of one rank: when a transfer on it may begin and when it is through, and the thread that keeps
time.

``Clock`` calls at a given time what would otherwise need a thread for each pending transfer.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """A daemon thread that calls each function at its time (time.perf_counter); starts when first needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._thread: threading.Thread | None = None

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call ``call``, which must not block nor raise, at ``when``; of equal times the earlier asked
        first."""
        with self._changed:
            heapq.heappush(self._calls, (when, next(self._number), call))
            if self._thread is None or not self._thread.is_alive():  # also after a fork
                self._thread = threading.Thread(target=self._serve, name="parallel.link", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._calls or self._calls[0][0] > time.perf_counter():
                    left = self._calls[0][0] - time.perf_counter() if self._calls else None
                    self._changed.wait(left if left is None else max(left, 0.0))
                call = heapq.heappop(self._calls)[2]
            call()
            del call  # it holds tensors, and the next may be long in coming


clock = Clock()


class Lanes:
    """A link: ``out`` and ``in`` carry one transfer at a time each; a collective takes both."""

    def __init__(self, latency: float, seconds_per_byte: float) -> None:
        self.latency, self.seconds_per_byte = latency, seconds_per_byte
        self.delays = latency > 0 or seconds_per_byte > 0
        self._free = {"out": 0.0, "in": 0.0}
        self._lock = threading.Lock()
        self._streams: dict[torch.device, Any] = {}

    def occupy(self, duration: float, *lanes: str) -> float:
        """When a transfer that may begin now, on lanes that carry others first, is through."""
        with self._lock:
            end = max(time.perf_counter(), *(self._free[lane] for lane in lanes)) + duration
            self._free.update(dict.fromkeys(lanes, end))
            return end

    def stream(self, device: torch.device) -> Any:
        """The stream on which the delays of a device's transfers queue up."""
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]


_rates: dict[torch.device, float] = {}


def cycles_per_second(device: torch.device) -> float:
    """How fast torch.cuda._sleep counts, measured once."""
    if device not in _rates:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda._sleep(1_000_000)
            start.record()
            torch.cuda._sleep(10_000_000)
            end.record()
            end.synchronize()
        _rates[device] = 10_000_000 / (start.elapsed_time(end) / 1e3)
    return _rates[device]
