"""Ranks that live as long as the tests: ``run(world_size, function, ...)`` on a world of real processes.

The processes are forked from one that has imported ``forked.py`` (multiprocessing's fork server): a world
starts in milliseconds, and a test that kills a rank costs no more. Each call gets process groups of its own.
What a rank raises, raises here, with its traceback; a rank that does not answer in time is named and ended.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
OURS = {"link": "parallel.link", "shm": "parallel.shm"}


def backend_of(world_size):
    """Where both are to be tried: gloo, which most people run, for 2 ranks, and shm, which is quicker."""
    return "gloo" if world_size == 2 else "shm"


def start_server():
    """Start the fork server, if none runs; it imports ``forked.py``, which it finds by PYTHONPATH alone."""
    multiprocessing.set_forkserver_preload(["forked"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


class RankFailed(AssertionError):
    """A rank raised; its traceback is in the message."""


class Ranks:
    """Up to ``most`` processes; a call uses the first ``world_size`` of them."""

    def __init__(self, most=4):
        self.most, self._number = most, 0
        self._context = multiprocessing.get_context("forkserver")
        start_server()
        self._ranks, self._store = {}, None
        self._folder = tempfile.TemporaryDirectory(prefix="perflab-ranks-")

    def run(self, world_size, function, *arguments, backend="shm", timeout=60.0, expect_death=()):
        """[what ``function(*arguments)`` returned on each rank], run with a default process group.

        function: importable (defined in a test module). backend: shm, whose calls
        take microseconds where gloo's take milliseconds, another, or None: without torch.distributed.
        expect_death: ranks that end themselves; their result is None.
        """
        self._number += 1
        store = self._port(), str(self._number)
        place = (function.__module__, function.__qualname__)
        for rank in range(world_size):
            self._rank(rank)[1].send((place, arguments, backend, rank, world_size, store, timeout))
        results = self._answers(world_size, timeout, f"{place[1]}{arguments}", expect_death)
        failed = {rank: text for rank, (right, text) in results.items() if not right}
        if failed:
            raise RankFailed("\n".join(f"rank {r} of {world_size}: {text}" for r, text in failed.items()))
        return [results[rank][1] if rank in results else None for rank in range(world_size)]

    def _port(self):
        """Where the store listens in which the ranks of every call meet. A file would do, but who waits for
        what another writes there looks every 10 ms, several times for each group."""
        from torch.distributed import TCPStore

        self._store = self._store or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def _answers(self, world_size, timeout, what, expect_death):
        results, dead, deadline = {}, set(), time.monotonic() + timeout + START_SECONDS * (self._number == 1)
        while len(results) + len(dead) < world_size:
            left = [rank for rank in range(world_size) if rank not in results and rank not in dead]
            ready = wait([self._ranks[rank][1] for rank in left], max(0.0, deadline - time.monotonic()))
            if not ready:
                where = "".join(f"\nrank {rank} is at\n{self._stack(rank)}" for rank in left)
                self.close()
                raise TimeoutError(
                    f"{what}: no answer from ranks {left} of {world_size} within {timeout:.0f} s{where}"
                    + "".join(
                        f"; rank {rank}: {text}" for rank, (right, text) in results.items() if not right
                    )
                )
            for rank in left:
                process, pipe = self._ranks[rank]
                if pipe not in ready:
                    continue
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    process.join()
                    del self._ranks[rank]
                    dead.add(rank)
                    if rank not in expect_death:
                        code = process.exitcode
                        self.close()
                        raise RankFailed(f"{what}: rank {rank} of {world_size} ended with {code}") from None
        return results

    def _rank(self, rank):
        tries = 0
        while rank not in self._ranks:
            ours, theirs = self._context.Pipe()
            arguments = theirs, list(sys.path), self._folder.name
            process = self._context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            # A fork of a process with threads (torch's imports may start some) can be born stuck.
            if ours.poll(START_SECONDS) and ours.recv() == "here":
                self._ranks[rank] = process, ours
                break
            process.kill()
            process.join()
            tries += 1
            print(f"rank {rank} did not start within {START_SECONDS:.0f} s, try {tries}", file=sys.stderr)
            if tries == 3:
                raise TimeoutError(f"rank {rank} did not start in {tries} tries of {START_SECONDS:.0f} s")
        return self._ranks[rank]

    def _stack(self, rank):
        """What each thread of a rank is doing."""
        process = self._ranks[rank][0]
        path, deadline = stacks(self._folder.name, process.pid), time.monotonic() + 1.0
        os.kill(process.pid, signal.SIGUSR1)
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # until all of it is written
        return path.read_text()

    def close(self):
        """End every rank."""
        for process, pipe in self._ranks.values():
            pipe.close()
            process.kill()
            process.join()
        self._ranks.clear()


def stacks(folder, process):
    """Where a rank writes what it is doing, when it is sent SIGUSR1."""
    return Path(folder) / f"stacks-{process}"


def serve(pipe, path, folder):
    """A rank: answer calls until the other end is gone."""
    import torch

    report = stacks(folder, os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, report)
    pipe.send("here")
    sys.path[:] = [str(ROOT), *path]
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            place, arguments, backend, rank, world_size, store, timeout = pipe.recv()
            try:
                answer = True, call(place, arguments, backend, rank, world_size, store, timeout)
            except BaseException as error:
                text = "".join(traceback.format_exception(error))
                answer = False, f"{type(error).__name__}: {error}\n{text}"
            pipe.send(answer)


@cache
def store_at(port):
    """Connected once for all calls: some networks let a connection in 25 wait for seconds."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False)


def call(place, arguments, backend, rank, world_size, store, timeout):
    import torch
    import torch.distributed as dist

    function = importlib.import_module(place[0])
    for name in place[1].split("."):
        function = getattr(function, name)
    torch.manual_seed(0)
    if backend is None:
        return function(*arguments)
    if backend in OURS:
        importlib.import_module(OURS[backend])  # which registers it
    # An init that failed here leaves its group's number behind: the next group would have another number,
    # and with it other keys in the store, than on a new rank, and neither would find the other.
    dist.distributed_c10d._world.group_count = 0
    patience, (port, number) = timedelta(seconds=timeout), store
    shared = store_at(port)
    shared.set_timeout(patience)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(number, shared),
        rank=rank,
        world_size=world_size,
        timeout=patience,
    )
    try:
        dist.barrier()  # a rank that were through already would break the others' connecting
        return function(*arguments)
    finally:
        dist.destroy_process_group()
