"""One transfer on a slow link: when it is done, and who waits for it. Nobody spins while it lasts."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.link_lanes import Lanes, clock, cycles_per_second
from parallel.traffic import blocked, counting

NO_TIMEOUT = timedelta(0)
GRACE_SECONDS = 10.0  # that the clock's thread may be late


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
