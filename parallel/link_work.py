"""The works of a slow link: when they are done, who waits for them, and the one thread that completes them.

``Lanes`` is the link of one rank, ``LinkWork`` one transfer on it, ``Clock`` the thread: it calls at a given
time what would otherwise need a thread for each pending transfer. Nobody spins: a delay costs no processor
time.
"""

import contextlib
import heapq
import itertools
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.traffic import blocked, counting

NO_TIMEOUT = timedelta(0)
GRACE_SECONDS = 10.0  # that the clock's thread may be late


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


class LinkWork(dist.Work):
    """A transfer on a link: done when the inner one is, and its time on the link has passed.

    issue: starts the inner transfer. what: for messages, who does what. duration: seconds on the link.
    """

    def __init__(
        self,
        issue: Callable[[], dist.Work],
        what: str,
        lanes: Lanes,
        operation: str,
        duration: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._inner: Any = None  # the inner work, once issued
        self._what, self._lanes, self._duration, self._device = what, lanes, duration, device
        self._lock = threading.Lock()
        self._issued = threading.Event()
        self._error: BaseException | None = None
        self._done: float | None = None  # when its time on the link is over; None: not known yet
        self._event: Any = None  # that of a CUDA device's
        self._future: Any = None
        if not duration:
            self._done = 0.0
            self._start(issue)
        elif device.type == "cuda":
            self._done = 0.0
            self._start(issue)
            self._delay_on_device()
        elif operation == "send":
            self._done = lanes.occupy(duration, "out")
            clock.at(self._done, lambda: self._start(issue, raising=False))
        elif operation == "recv":
            self._done = lanes.occupy(duration, "in")
            self._start(issue)
        else:
            self._start(issue)
            inner: Any = self._inner
            with contextlib.suppress(Exception):  # a work without a future is settled in wait()
                inner.get_future().add_done_callback(lambda _: self._settle())

    def _start(self, issue: Callable[[], dist.Work], raising: bool = True) -> None:
        try:
            self._inner = issue()
        except BaseException as error:
            self._error = error
            if raising:
                raise
        finally:
            self._issued.set()

    def _settle(self) -> float:
        """The inner transfer is over: its time on the link begins, once. Returns when it ends."""
        with self._lock:
            if self._done is None:
                self._done = self._lanes.occupy(self._duration, "in", "out")
            return self._done

    def _delay_on_device(self) -> None:
        """On a stream of the link the device sleeps after the transfer; who waits, waits for that."""
        stream = self._lanes.stream(self._device)
        with torch.cuda.stream(stream):
            self._inner.wait()
            torch.cuda._sleep(int(self._duration * cycles_per_second(self._device)))
            self._event = stream.record_event()

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        """Block until done. What the inner transfer raises, raises here, with a note that says who waited."""
        with blocked():
            try:
                self._wait(timeout)
            except BaseException as error:
                error.add_note(f"{self._what}: failed")
                raise
        return True

    def _wait(self, timeout: timedelta) -> None:
        self._await_issue()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            return
        if timeout == NO_TIMEOUT:
            self._inner.wait()
        else:
            self._inner.wait(timeout)
        left = self._settle() - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def _await_issue(self) -> None:
        """A send leaves when its time on the link is over, a little after ``_done`` at most."""
        if not self._issued.wait(max(0.0, (self._done or 0.0) - time.perf_counter()) + GRACE_SECONDS):
            raise TimeoutError(f"{self._what}: not sent {GRACE_SECONDS:.0f} s after its time")
        if self._error is not None:
            raise self._error

    def get_future(self) -> Any:
        """A future that is set when the transfer is done, or failed."""
        if counting() and _asked_in_backward():
            # DDP's reducer waits for the future in C++ when backward ends. Waiting for it just before can
            # be timed.
            torch.autograd.Variable._execution_engine.queue_callback(self.wait)
        self._await_issue()
        inner = self._inner.get_future()
        if self._done is not None and not self._duration:
            return inner
        with self._lock:
            first, self._future = self._future is None, self._future or self._make_future()
        if first:
            inner.add_done_callback(self._arrived)
        return self._future[1]

    def _make_future(self) -> tuple[Any, Any]:
        if self._event is not None:
            plain: Any = torch.futures.Future(devices=[self._device])
        else:
            plain = torch.futures.Future()
        return plain, plain.then(_outcome)

    def _arrived(self, inner: Any) -> None:
        try:
            value = inner.value()
        except Exception as error:
            error.add_note(f"{self._what}: failed")
            value = error
        plain = self._future[0]
        if self._event is not None:
            with torch.cuda.stream(self._lanes.stream(self._device)):
                plain.set_result(value)
        else:
            clock.at(self._settle(), lambda: plain.set_result(value))

    def is_completed(self) -> bool:
        if not self._issued.is_set():
            return False
        if self._error is not None:
            return True
        if self._event is not None:
            return self._event.query()
        return self._inner.is_completed() and time.perf_counter() >= self._settle()

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None and self._inner.is_success()

    def exception(self) -> Any:
        return self._error if self._inner is None else self._inner.exception()

    def result(self) -> Any:
        return self._inner.result()

    def source_rank(self) -> int:
        return self._inner.source_rank() if hasattr(self._inner, "source_rank") else self._source_rank()

    def _source_rank(self) -> int:
        return self._inner._source_rank()

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()


def _outcome(plain: Any) -> Any:
    """An exception set from Python is a value to C++; raised in ``then`` it is an error there, too."""
    value = plain.value()
    if isinstance(value, BaseException):
        raise value
    return value


def _asked_in_backward() -> bool:
    """Whether torch itself (C++, or a communication hook) calls get_future(), within a backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    try:
        asker = sys._getframe(2).f_globals.get("__name__", "")
    except ValueError:  # a thread of the autograd engine, without Python below
        return True
    return asker.startswith(("torch.autograd", "torch.distributed"))


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
