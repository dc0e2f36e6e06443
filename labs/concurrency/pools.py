"""The ways to run: pools of threads and processes that are up, bounded in time, and leave nothing behind.

``forkserver`` is the way processes are started unless the start itself is what is measured. ``fork``
copies a process while its other threads hold locks, and a runner that has used torch, JAX or numba has
such threads (``labs/concurrency/hazards.py`` shows what follows), so fork is only ever called inside a
``Launcher``: a fresh process that has imported nothing else.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from labs.concurrency import workers as tasks

PATIENCE_S = 60.0  # every wait of the lab ends after this long and says who waited for whom
MODULES = ("numpy",)  # what tasks need: imported while a pool starts, not inside its first task


class Step:
    """A callable to time, and what to close after it."""

    def __init__(self, run: Callable[[], object], *closing: Callable[[], object]) -> None:
        self.run, self.closing = run, closing

    def __call__(self) -> object:
        return self.run()

    def close(self) -> None:
        for close in self.closing:
            close()
        self.closing = ()


def results(futures: Sequence[Future[Any]], who: str) -> list[Any]:
    """What the futures return, in order; TimeoutError naming the waiter and the first late task."""
    end = time.monotonic() + PATIENCE_S
    values = []
    for index, future in enumerate(futures):
        try:
            values.append(future.result(max(0.0, end - time.monotonic())))
        except TimeoutError:
            if future.done():  # the task itself raised it
                raise
            for late in futures:
                late.cancel()
            which = f"task {index + 1} of {len(futures)}"
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {who}: {which}") from None
    return values


class Pool:
    """Workers that are up, behind one of the standard library's executors."""

    def __init__(self, executor: Executor, who: str, workers: int) -> None:
        self.executor, self.who, self.workers = executor, who, workers
        self.users = 0

    def run(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """``function(*each)`` for each of ``arguments``, a task each; TimeoutError ends the workers."""
        futures = [self.executor.submit(function, *each) for each in arguments]
        return self._wait(lambda: results(futures, self.who))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunk: int) -> list[Any]:
        """``function(item)`` for each item, ``chunk`` items a task."""
        found = self.executor.map(function, items, chunksize=chunk, timeout=PATIENCE_S)
        return self._wait(lambda: list(found))

    def _wait(self, wait: Callable[[], list[Any]]) -> list[Any]:
        try:
            return wait()
        except TimeoutError as late:
            self.end()
            raise TimeoutError(str(late) or f"waited {PATIENCE_S:g} s for {self.who}") from None

    def end(self) -> None:
        """Gives up on the workers: processes are killed (a thread cannot be)."""
        for process in list((getattr(self.executor, "_processes", None) or {}).values()):
            with suppress(ProcessLookupError, ValueError):
                process.kill()
        self.executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Shuts down when the last of the steps that share the pool is closed."""
        self.users -= 1
        if self.users <= 0:
            self.executor.shutdown(wait=True, cancel_futures=True)
            for key in [key for key, pool in _pools.items() if pool is self]:
                del _pools[key]


_pools: dict[tuple[str, int], Pool] = {}


def process_pool(workers: int, method: str = "forkserver") -> Pool:
    """A running pool of processes, shared by all steps of this process that want the same one."""
    pool = _pools.get(("processes " + method, workers))
    if pool is None:
        if method == "fork":
            raise ValueError("fork is only safe in a process without threads: use a Launcher")
        executor = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context(method),
            initializer=tasks.prepare,
            initargs=(MODULES,),
        )
        pool = Pool(executor, f"a pool of {workers} processes ({method})", workers)
        seen: set[int] = set()
        end = time.monotonic() + PATIENCE_S
        with lean_main():
            while len(seen) < workers:  # until each has answered: no start-up inside a timed step
                seen.update(pool.run(tasks.hello, [(0.01,)] * workers))
                if time.monotonic() > end:
                    pool.end()
                    raise TimeoutError(f"{len(seen)} of {workers} processes ({method}) came up")
        _pools["processes " + method, workers] = pool
    pool.users += 1
    return pool


def thread_pool(workers: int) -> Pool:
    """A running pool of threads, shared like ``process_pool``'s."""
    pool = _pools.get(("threads", workers))
    if pool is None:
        executor = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        pool = Pool(executor, f"a pool of {workers} threads", workers)
        pool.run(tasks.wait, [(0.01,)] * workers)
        _pools["threads", workers] = pool
    pool.users += 1
    return pool


@contextmanager
def lean_main() -> Iterator[None]:
    """While this is on, new processes do not import the program that started them.

    Started by spawn or forkserver, a child imports its parent's ``__main__`` first
    (``multiprocessing.spawn.get_preparation_data``): here that is the runner with all that it imports,
    which no task of this lab needs. An empty module has neither name nor path to import.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --- starting pools, where fork is safe ----------------------------------------------------------


def start_and_stop(method: str, workers: int) -> list[int]:
    """Starts a pool, gives each worker one task, ends it: what someone pays who parallelises once."""
    arguments = range(workers)
    if method == "threads":
        with ThreadPoolExecutor(workers) as threads:
            return results([threads.submit(tasks.nothing, item) for item in arguments], f"{workers} threads")
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=tasks.prepare) as processes:
        who = f"a new pool of {workers} processes ({method})"
        return results([processes.submit(tasks.nothing, item) for item in arguments], who)


def _serve(connection: Any) -> None:
    tasks.die_with_parent()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                connection.send(("done", start_and_stop(*connection.recv())))
            except (TimeoutError, OSError, RuntimeError) as error:
                connection.send(("failed", f"{type(error).__name__}: {error}"))


class Launcher:
    """A process of its own that starts and stops pools on request, one thread, nothing imported."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), name="launcher")
        with lean_main():
            self.process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing's own exit, which would wait for the process

    def start_and_stop(self, method: str, workers: int) -> list[int]:
        self.connection.send((method, workers))
        if not self.connection.poll(PATIENCE_S):
            self.close()
            raise TimeoutError(f"waited {PATIENCE_S:g} s for the launcher to start {workers} by {method}")
        state, value = self.connection.recv()
        if state == "failed":
            raise RuntimeError(f"the launcher could not start {workers} workers by {method}: {value}")
        return value

    def close(self) -> None:
        atexit.unregister(self.close)
        self.connection.close()  # the launcher reads the end of its pipe and leaves
        self.process.join(5.0)
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join(5.0)


# --- memory that processes share -----------------------------------------------------------------


class SharedArray:
    """``elements`` float32 in a shared-memory segment; the one who made it unlinks it."""

    def __init__(self, elements: int) -> None:
        from multiprocessing import shared_memory

        import numpy as np

        self.segment = shared_memory.SharedMemory(create=True, size=4 * elements)
        self.array: Any = np.ndarray(elements, np.float32, self.segment.buf)
        self.name = self.segment.name

    def close(self) -> None:
        self.array = None  # a mapping that an array still uses cannot be closed
        self.segment.close()
        self.segment.unlink()
