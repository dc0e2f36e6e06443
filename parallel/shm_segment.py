"""The memory that the ranks of one group share, and who of them is alive.

Rank 0 makes the segment with ``memfd_create``: it has no name, so nobody can guess one and nothing is left
behind whenever and however a rank ends; the kernel frees it with its last mapping. The other ranks open it
through ``/proc/PID/fd``, which the kernel grants to the same user only; the file's mode is 0600 and its
size is sealed, so that nobody can truncate it under the others. A random number in it, given through the
store, shows that it is the right one. When all have mapped it the descriptor is closed.

Each rank holds a pidfd of each other (``pidfd_open``), which tells within microseconds whether that process
has ended, without being fooled by a reused process number; a rank that leaves in good order, or gives up,
says so in the segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import select
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel.liveness import this_host

LINE = 64
SLOTS, SLOT_BYTES = 4, 1 << 17
"""Of each rank for collectives: chunks stay in the second-level cache on their way from core to core."""
CHANNEL_SLOTS, CHANNEL_BYTES = 4, 1 << 16
"""From each rank to each other, for send and recv."""
MOST_RANKS = 1 << 10

# What a rank says of itself in its line of the segment.
ABSENT, JOINED, LEFT, FAILED = range(4)
_STATE, _PROCESS, _CULPRIT = range(3)
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4  # no further seals, no shrinking, no growing (linux/fcntl.h)


@dataclass(frozen=True)
class Area:
    """Addresses of one exchange: slots, their stride and payload in bytes, the lines of rounds taken.

    The line before a slot's payload: the round that it holds + 1, signature, count, how many sleep on it; a
    line of rounds taken: their number, how many sleep on it.
    """

    slots: int
    stride: int
    slot_bytes: int
    slot_base: int
    taken_base: int


def _page(count: int) -> int:
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


class Segment:
    """Join the segment of a group; returns when all ranks have.

    store: of this group, seen by its ranks alone. rank: in the group. names: what errors call its ranks,
    which is their ranks in the world.

    ValueError where ranks cannot share memory; DistBackendError for a rank that does not join within
    ``timeout`` seconds, or that dies meanwhile; each names the rank.
    """

    def __init__(self, store: Any, rank: int, names: Sequence[int], timeout: float):
        size = len(names)
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise ValueError("shm needs Linux 5.3 or later; gloo runs everywhere")
        if size > MOST_RANKS:
            raise ValueError(f"shm is for at most {MOST_RANKS} ranks of one host, not {size}")
        self.rank, self.size, self.names, self.process = rank, size, tuple(names), os.getpid()
        self._lay_out()
        deadline = time.monotonic() + timeout
        descriptor = self._create(store) if rank == 0 else self._open(store, deadline, timeout)
        try:
            if rank != 0:
                self._map(descriptor)
            self._watch(deadline, timeout)
        finally:
            os.close(descriptor)

    def _lay_out(self) -> None:
        size = self.size
        self._stride = LINE + SLOT_BYTES
        self._channel_stride = LINE + CHANNEL_BYTES
        self._taken = _page(LINE * (1 + size))
        self._slots = _page(self._taken + LINE * size)
        self._channels = _page(self._slots + size * SLOTS * self._stride)
        self._channel_size = _page(2 * LINE + CHANNEL_SLOTS * self._channel_stride)
        self.bytes = self._channels + size * size * self._channel_size

    # --- setting up ---------------------------------------------------------------------------

    def _create(self, store: Any) -> int:
        descriptor = os.memfd_create("perflab-shm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, self.bytes)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
        secret = secrets.token_hex(8)
        self._map(descriptor)
        self._memory[:8] = bytes.fromhex(secret)
        store.set("segment", f"{os.getpid()} {descriptor} {secret} {this_host()}")
        return descriptor

    def _open(self, store: Any, deadline: float, timeout: float) -> int:
        while not store.check(["segment"]):  # a blocking get would be deaf to Ctrl-C
            if time.monotonic() > deadline:
                raise dist.DistBackendError(
                    f"shm: rank {self.rank} has waited {timeout:g} s for rank 0 of {self.size} to join"
                )
            time.sleep(0.001)
        process, number, secret, machine = store.get("segment").decode().split()
        if machine != this_host():
            raise ValueError(
                f"shm: ranks 0 and {self.rank} are on different hosts or in different containers (boot and "
                f"PID namespace {machine} and {this_host()}); shm joins processes of one host, gloo others"
            )
        path = f"/proc/{process}/fd/{number}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise dist.DistBackendError(
                f"shm: rank 0 (process {process}) died while rank {self.rank} joined it"
            ) from None
        except PermissionError:
            raise ValueError(
                f"shm: rank {self.rank} may not open {path} of rank 0: both have to run as the same user"
            ) from None
        if os.pread(descriptor, 8, 0) != bytes.fromhex(secret):
            os.close(descriptor)
            raise dist.DistBackendError(
                f"shm: rank 0 (process {process}) died while rank {self.rank} joined it"
            )
        return descriptor

    def _map(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.bytes)
        self._memory.madvise(
            mmap.MADV_DONTFORK
        )  # a child (of a DataLoader) must not keep it when the ranks end
        self._words = memoryview(self._memory).cast("q")
        start = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(start)

    def _watch(self, deadline: float, timeout: float) -> None:
        """Announce this process and wait for the others, each watched from when it joins."""
        self._poll = select.poll()
        self._pidfds: dict[int, int] = {}
        mine = LINE // 8 * (1 + self.rank)
        self._words[mine + _PROCESS] = os.getpid()
        self._words[mine + _STATE] = JOINED
        while True:
            for rank in range(self.size):
                if rank not in self._pidfds.values() and rank != self.rank and self.state(rank) != ABSENT:
                    self._watch_one(rank)
            missing = [
                rank for rank in range(self.size) if rank != self.rank and rank not in self._pidfds.values()
            ]
            gone = self.dead()
            if gone and missing:
                self.fail(gone[0])
                raise dist.DistBackendError(
                    f"shm: {self.describe(gone[0])} while rank {self.rank} waited for ranks {missing} to join"
                )
            if not missing:
                return
            if time.monotonic() > deadline:
                self.fail(missing[0])
                absent = [self.names[rank] for rank in missing]
                raise dist.DistBackendError(
                    f"shm: rank {self.names[self.rank]} has waited {timeout:g} s for ranks {absent} to join"
                )
            time.sleep(0.0005)

    def process_of(self, rank: int) -> int:
        return self._words[LINE // 8 * (1 + rank) + _PROCESS]

    def _watch_one(self, rank: int) -> None:
        try:
            pidfd = os.pidfd_open(self.process_of(rank))
        except ProcessLookupError:
            pidfd = os.open(
                "/dev/null", os.O_RDONLY | os.O_CLOEXEC
            )  # always readable, as that of a dead process
        self._pidfds[pidfd] = rank
        self._poll.register(pidfd, select.POLLIN)

    # --- who is alive ----------------------------------------------------------------------------

    def state(self, rank: int) -> int:
        """ABSENT, JOINED, LEFT or FAILED, as the rank says."""
        return self._words[LINE // 8 * (1 + rank) + _STATE]

    def dead(self) -> list[int]:
        """Ranks whose process has ended, or that have left or given up."""
        ended = {self._pidfds[pidfd] for pidfd, _ in self._poll.poll(0)}
        return [rank for rank in range(self.size) if rank in ended or self.state(rank) > JOINED]

    def describe(self, rank: int) -> str:
        """Of one that is ``dead``: what became of it."""
        line = LINE // 8 * (1 + rank)
        name = f"rank {self.names[rank]} (process {self.process_of(rank)})"
        if self.state(rank) == LEFT:
            return f"{name} has left the group"
        if self.state(rank) == FAILED:
            culprit = self._words[line + _CULPRIT]
            if culprit in (rank, self.rank):
                return f"{name} has given up"
            if self.state(culprit) == JOINED and culprit in self.dead():
                return f"{name} has given up because {self.describe(culprit)}"
            return f"{name} has given up waiting for rank {self.names[culprit]}"
        return f"{name} has died"

    def _say(self, state: int, culprit: int) -> None:
        line = LINE // 8 * (1 + self.rank)
        if os.getpid() == self.process and self._words[line + _STATE] == JOINED:
            self._words[line + _CULPRIT] = culprit
            self._words[line + _STATE] = state

    def fail(self, culprit: int) -> None:
        """Tell the others that this rank has given up because of ``culprit``: itself, or who is missing."""
        self._say(FAILED, culprit)

    def leave(self) -> None:
        """Tell the others that this rank has left. The memory goes with the last reference to this object."""
        self._say(LEFT, self.rank)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.leave()
        for pidfd in getattr(self, "_pidfds", ()):
            with contextlib.suppress(OSError):
                os.close(pidfd)

    # --- where things are ------------------------------------------------------------------------

    def collectives(self) -> Area:
        """Where the ranks exchange what belongs to collectives; a member's number is its rank."""
        return Area(SLOTS, self._stride, SLOT_BYTES, self._address + self._slots, self._address + self._taken)

    def channel(self, source: int, target: int) -> Area:
        """From rank ``source`` (member 0, which alone writes) to rank ``target`` (member 1)."""
        start = self._address + self._channels + (source * self.size + target) * self._channel_size
        return Area(CHANNEL_SLOTS, self._channel_stride, CHANNEL_BYTES, start + 2 * LINE, start)

    def header(self, area: Area, member: int, round_number: int) -> tuple[int, int, int]:
        """(round that the slot holds + 1, signature, count) of the slot for a round."""
        slot = area.slot_base + (member * area.slots + round_number % area.slots) * area.stride
        return struct.unpack_from("qqq", self._memory, slot - self._address)

    def taken(self, area: Area, member: int) -> int:
        """Rounds that a member is done with."""
        return self._words[(area.taken_base + member * LINE - self._address) // 8]

    def take(self, area: Area, member: int, rounds: int) -> None:
        """Say that ``member``, which is this rank, is done with this many rounds."""
        self._words[(area.taken_base + member * LINE - self._address) // 8] = rounds
