"""Operations on their way through shared memory: who runs them, who waits, and what ends a wait.

A lane is one ordered stream of operations: the collectives of a group are one, each pair of ranks that
sends and receives another. An operation is a generator that describes one exchange after another in the
lane's block. It is advanced by whoever has reason to, under one lock for the group: the caller of a
synchronous operation, in its own thread; ``wait()``, which takes over from where the operation stands; and
for what nobody waits for, a thread of the group, so that asynchronous work completes by itself.

A wait first spins, giving its core away in between, then sleeps until it is woken (``parallel.shm_words``);
where several lanes are waited on at once, it sleeps for a moment and looks at all of them again. It is ended
by a signal (Ctrl-C), by the time-out, and by the death of a rank that it needs; the error says who waited
for whom. After that the group is broken and says why at each further call, here and, through the segment,
on other ranks.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel import shm_exchange as kernel
from parallel.shm_reduce import SCRATCH_BYTES
from parallel.shm_segment import Area, Segment
from parallel.shm_words import FUTEX

Steps = Generator[None, int, None]
"""What an operation does: each yield runs the exchange its lane describes and gives back how it ended."""

SPINS, YIELDS = 30, 50  # looks at a word before the core is given away (about 1 us), and how often it is
HASTY_YIELDS = 5  # where there is other work to do
NAP = 5_000_000 if FUTEX else 0  # nanoseconds that one call of ``exchange`` then sleeps at most
BRIEF = 64 << 10  # bytes up to which an asynchronous operation is tried at once by its caller
ROUNDS_A_CALL = 256  # after which a call returns, so that signals are served in the midst of gigabytes
IDLE_SECONDS = 1.0  # after which the thread ends


class Lane:
    """An ordered stream of exchanges among ``ranks`` (of the group), of which this one is number ``me``."""

    def __init__(self, area: Area, ranks: Sequence[int], me: int):
        members = len(ranks)
        self.area, self.ranks, self.me = area, tuple(ranks), me
        self.queue: deque[Operation] = deque()
        self.before = 0  # rounds of finished operations
        self.rounds = 1  # of the exchange that the block describes
        self.words = (ctypes.c_int64 * (kernel.TABLES + 5 * members))()
        self._scratch = ctypes.create_string_buffer(SCRATCH_BYTES + 64)
        scratch = -(-ctypes.addressof(self._scratch) // 64) * 64
        self.words[: kernel.BEFORE] = [
            members,
            me,
            area.slots,
            area.stride,
            area.slot_base,
            area.taken_base,
            scratch,
            ROUNDS_A_CALL,
            SPINS,
            YIELDS,
            0,
            NAP,
            0,
        ]
        self.address = ctypes.addressof(self.words)
        self._layout = struct.Struct(f"{kernel.TABLES - kernel.BEFORE + 4 * members}q")
        self._nothing = (0,) * (members - 1)

    def describe(
        self,
        role: int,
        signature: int,
        count: int,
        inputs: Sequence[tuple[int, int]],
        outputs: Sequence[tuple[int, int]],
        reduce: int = 0,
        factor: int = 0,
        longest: int = 0,
    ) -> None:
        """The next exchange: (address, bytes) of what goes to all (one entry) or to each, and comes back.

        With ``reduce`` all entries of ``outputs`` are the same: where the reduction goes. longest: bytes of
        the largest entry of any rank, where this rank has none as large.
        """
        members, parts = len(self.ranks), len(inputs)
        chunk = self.area.slot_bytes // parts // kernel.LINE * kernel.LINE
        longest = max(longest, max(size for _, size in inputs), max(size for _, size in outputs))
        self.rounds = max(1, -(-longest // chunk))
        unused = (0,) * (members - parts)
        self._layout.pack_into(
            self.words,
            kernel.BEFORE * 8,
            *(self.before, self.rounds, chunk, parts, role, signature, count, reduce, factor, 0, 0),
            *(address for address, _ in inputs),
            *unused,
            *(size for _, size in inputs),
            *unused,
            *(address for address, _ in outputs),
            *(size for _, size in outputs),
        )

    def describe_all_reduce(self, signature: int, count: int, address: int, size: int, reduce: int) -> None:
        """``describe`` for one tensor that is reduced in place: what has to be quick."""
        chunk = self.area.slot_bytes
        self.rounds = -(-size // chunk) or 1
        self._layout.pack_into(
            self.words,
            kernel.BEFORE * 8,
            *(self.before, self.rounds, chunk, 1, kernel.POSTS | kernel.COMPARES, signature, count),
            *(reduce, 0, 0, 0, address),
            *self._nothing,
            size,
            *self._nothing,
            address,
            *self._nothing,
            *(size,) * len(self.ranks),
        )

    def stream(self, streams: bool) -> None:
        """Whether this rank writes large chunks past its caches; no other rank needs to know."""
        self.words[kernel.STREAMS] = int(streams)

    def be_patient(self, patient: bool) -> None:
        """How long a call of ``exchange`` waits: while there is other work, hardly at all."""
        self.words[kernel.YIELDS] = YIELDS if patient else HASTY_YIELDS
        self.words[kernel.NAP_NANOSECONDS] = NAP if patient else 0

    def waits_for(self, segment: Segment) -> list[int]:
        """Ranks without which the exchange cannot go on now."""
        consumed, written, me = self.words[kernel.CONSUMED], self.words[kernel.WRITTEN], self.me
        compares = consumed == 0 and self.words[kernel.ROLE] & kernel.COMPARES
        sizes = kernel.TABLES + 3 * len(self.ranks)
        behind = []
        for member, rank in enumerate(self.ranks):
            if member == me:
                continue
            wanted = compares or self.words[sizes + member] > consumed * self.words[kernel.CHUNK]
            late = segment.header(self.area, member, self.before + consumed)[0] <= self.before + consumed
            room = segment.taken(self.area, member) > self.before + written - self.area.slots
            if (consumed < written and wanted and late) or (written == consumed and not room):
                behind.append(rank)
        return behind


class Operation(dist.Work):
    """Work of one rank on one lane. ``result``: what its future holds."""

    def __init__(self, progress: Progress, lane: Lane, name: str, steps: Steps, result: Any, timeout: float):
        super().__init__()
        self.progress, self.lane, self.name, self.steps, self.value = progress, lane, name, steps, result
        self.timeout = timeout
        self.error: BaseException | None = None
        self.finished = self.begun = self.last_try = False
        self.stalled_since = 0.0
        self.source = -1
        self._future: torch.futures.Future | None = None
        self._settling = threading.Lock()

    def advance(self, run: Callable[[int], int]) -> bool:
        """Go on as far as goes without waiting. True: something moved."""
        lane, moved = self.lane, False
        try:
            if not self.begun:
                self.begun = True
                next(self.steps)
            while True:
                status = run(lane.address)
                if status == kernel.STALLED:
                    return moved
                moved = True
                self.last_try, self.stalled_since = False, 0.0
                if status == kernel.RUNNING:
                    return True
                if status == kernel.DONE:
                    lane.before += lane.rounds
                self.steps.send(status)
        except StopIteration:
            self.settle(None)
        except Exception as error:
            self.settle(error)
        return True

    def settle(self, error: BaseException | None) -> None:
        """The end, once: what another thread has broken off does not succeed any more."""
        with self._settling:
            if self.finished:
                return
            self.error, self.finished = error, True
            future = self._future
        if future is not None:
            self._fulfil(future)

    def _fulfil(self, future: torch.futures.Future) -> None:
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)

    # --- what torch calls ------------------------------------------------------------------------

    def wait(self, timeout: Any = None) -> bool:
        if not self.finished:
            self.progress.drive(self, timeout)
        if self.error is not None:
            raise self.error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self.finished

    def is_success(self) -> bool:
        return self.finished and self.error is None

    def exception(self) -> BaseException | None:
        return self.error

    def result(self) -> Any:
        self.wait()
        return self.value

    def get_future(self) -> torch.futures.Future:
        with self._settling:
            made, future = self._future is None, self._future or torch.futures.Future()
            self._future = future
            over = made and self.finished  # else ``settle`` finds the future, and fulfils it
        if over:
            self._fulfil(future)
        return future

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank


class Finished(dist.Work):
    """What a synchronous operation returns: it is over."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


class Progress:
    """All lanes of one rank in one group."""

    def __init__(self, segment: Segment, timeout: float):
        self.segment, self.timeout = segment, timeout
        self.run, self._kept = kernel.compiled()
        self.lock = threading.Lock()
        self.lanes: list[Lane] = []
        self.streams = False
        self.failure: str | None = None
        self._waiters = 0
        self._thread: threading.Thread | None = None
        self._wake, self._quiet = threading.Event(), threading.Event()
        self._quiet.set()

    def lane(self, area: Area, ranks: Sequence[int], me: int) -> Lane:
        self.lanes.append(Lane(area, ranks, me))
        self.lanes[-1].stream(self.streams)
        return self.lanes[-1]

    def stream(self, streams: bool) -> None:
        """How all lanes write, those of today and those that are made later."""
        self.streams = streams
        for lane in self.lanes:
            lane.stream(streams)

    def submit(self, operation: Operation, brief: bool, asynchronous: bool) -> dist.Work:
        """Run a synchronous operation to its end; start an asynchronous one."""
        self.check()
        lane = operation.lane
        lane.queue.append(operation)
        if not asynchronous:
            operation.wait()
            return operation
        if brief and self.lock.acquire(False):
            # Two ranks in step meet here: the second finds the first one's part and both are done, without
            # the wake-up of a thread, which costs more than a small operation.
            try:
                if lane.queue and lane.queue[0] is operation:  # another thread may have finished it
                    self._advance(lane, False)
            finally:
                self.lock.release()
        if not operation.finished:
            self._serve()
        return operation

    def check(self) -> None:
        """DistBackendError where an earlier operation has broken the group."""
        if self.failure is not None:
            raise dist.DistBackendError(f"shm: this group is broken: {self.failure}")

    def drive(self, operation: Operation, timeout: Any = None) -> None:
        """Advance everything until ``operation`` is finished. KeyboardInterrupt breaks the group."""
        if timeout is not None and (seconds := timeout.total_seconds()) > 0:
            operation.timeout = seconds
        self._waiters += 1
        self._quiet.clear()
        try:
            with self.lock:
                while not operation.finished:
                    if not self._advance_all(True):
                        pause = self._look_around()
                        if not NAP or len(self._busy()) > 1:  # else ``exchange`` has slept, and was not woken
                            time.sleep(pause)
        except BaseException as error:
            self.break_off(f"{type(error).__name__} in {operation.name}", self.segment.rank)
            raise
        finally:
            self._waiters -= 1
            if not self._waiters:
                self._quiet.set()

    def break_off(self, reason: str, culprit: int) -> None:
        """End all operations with an error, here and on the ranks that wait for this one."""
        if self.failure is None:
            self.failure = reason
        self.segment.fail(culprit)
        for lane in self.lanes:
            while lane.queue:
                lane.queue.popleft().settle(dist.DistBackendError(f"shm: {reason}"))

    def _busy(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.queue]

    def _advance_all(self, patient: bool) -> bool:
        busy, moved = self._busy(), False
        for lane in busy:
            moved |= self._advance(lane, patient and len(busy) == 1)
        return moved

    def _advance(self, lane: Lane, patient: bool) -> bool:
        queue = lane.queue
        lane.be_patient(patient)
        moved = bool(queue) and queue[0].advance(self.run)
        lane.be_patient(True)  # as a synchronous operation is, whose caller describes it alone
        while queue and queue[0].finished:
            queue.popleft()
        return moved

    def _look_around(self) -> float:
        """Nothing moved: end what has no hope. Seconds to sleep before the next try."""
        now, shortest, dead = time.monotonic(), 0.002, self.segment.dead()
        for lane in self._busy():
            if not lane.queue:  # another lane's end was that of all
                break
            operation = lane.queue[0]
            operation.stalled_since = operation.stalled_since or now
            waited, behind = now - operation.stalled_since, lane.waits_for(self.segment)
            gone = [rank for rank in behind if rank in dead]
            names = ", ".join(f"rank {self.segment.names[rank]}" for rank in behind)
            mine = f"rank {self.segment.names[self.segment.rank]}"
            if gone and operation.last_try:
                fate = self.segment.describe(gone[0])
                self.break_off(f"{fate}; {mine} waited for it in {operation.name}", gone[0])
            elif behind and waited > operation.timeout:
                self.break_off(
                    f"time-out: {mine} has waited {operation.timeout:g} s for {names} in {operation.name}",
                    behind[0],
                )
            else:
                operation.last_try = bool(gone)  # what it did before it ended may have arrived meanwhile
                shortest = min(shortest, waited / 8)
        return shortest

    # --- what nobody waits for -------------------------------------------------------------------

    def _serve(self) -> None:
        self._wake.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="shm", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while self._wake.wait(IDLE_SECONDS):
            self._wake.clear()
            while any(lane.queue for lane in self.lanes):
                self._quiet.wait()  # while somebody waits, that thread does it
                with self.lock:
                    moved = self._advance_all(False)
                    pause = 0.0 if moved else self._look_around()
                if pause:
                    time.sleep(pause)
