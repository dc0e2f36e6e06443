"""Is every rank still there? A thread that knows within half a second, and says so where it is needed.

A process that is killed sends no message. What is certain is the kernel's word, so each rank watches the
processes of its own host in /proc (a heartbeat would call a rank dead that only compiles or swaps), and
tells the other hosts through the store. Ranks that raise say so in the store themselves. Under torchrun the
agent is watched
too: workers that it can no longer end must end by themselves.

The main thread may be anywhere when a rank is lost: computing, sleeping, or inside of a collective that waits
for ever. It gets a signal, whose handler raises `RankLost`. If it has not come out within
``GRACE_SECONDS``, it hangs where no signal reaches, and the process ends.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0
INTERRUPT = signal.SIGRTMIN + 6  # a real-time signal: nobody else's, unlike SIGUSR1


class RankLost(RuntimeError):
    """A rank has died or raised; the message says which, where, and what is known of why."""


@dataclass(frozen=True)
class Member:
    """A process of the world: enough to recognise it, and to see that it is gone."""

    rank: int
    world_size: int
    pid: int
    started: int  # clock ticks since boot: tells the process from a later one of the same pid
    host: str  # boot and process-id namespace: in another one the pid means nothing
    name: str  # of the host, for messages
    token: str

    @classmethod
    def of_this_process(cls, rank: int, world_size: int, token: str) -> "Member":
        pid = os.getpid()
        return cls(rank, world_size, pid, started(pid) or 0, this_host(), os.uname().nodename, token)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "Member":
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} (process {self.pid} on {self.name})"


def started(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if it has ended (a zombie has)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def this_host() -> str:
    """What processes that see each other under /proc have in common: this boot and the PID namespace. One
    word."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc: no peer is recognised as a process of this host
        return f"{os.uname().nodename}/{os.getpid()}"


class Watch(threading.Thread):
    """Watches the other members from `start` to `stop`. ``lost`` then holds what happened, or None.

    connect: makes a connection to the store of this thread's own (the main thread may block on the other
    one).
    """

    def __init__(self, me: Member, members: list[Member], connect: Callable[[], dist.Store]) -> None:
        super().__init__(name="perflab-liveness", daemon=True)
        self.me = me
        self.lost: str | None = None
        self._others = {member.rank: member for member in members if member.rank != me.rank}
        self._store = connect()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopped, self._changed = threading.Event(), threading.Event()
        self._quiet = False  # the main thread is leaving: it looks at ``lost`` by itself
        self._main = threading.main_thread()
        self._handles_signal = False

    def start(self) -> None:
        if threading.current_thread() is self._main:  # else nobody can be interrupted: only the process ended
            signal.signal(INTERRUPT, self._interrupted)
            self._handles_signal = True
        super().start()

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(GRACE_SECONDS)
        if self._handles_signal:
            signal.signal(INTERRUPT, signal.SIG_IGN)  # one may still be on its way

    def quiet(self, seconds: float) -> str | None:
        """No more interruptions: the main thread leaves. What was lost, waiting ``seconds`` for news of
        it."""
        self._quiet = True
        if self.lost is None and seconds:
            self._changed.wait(seconds)
        return self.lost

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.lost = self._look()
            if self.lost:
                self._changed.set()
                self._tell()
                return

    def _look(self) -> str | None:
        if self._parent is not None and os.getppid() != self._parent:
            return f"torchrun (process {self._parent}) has ended, and rank {self.me.rank} with it"
        for member in list(self._others.values()):
            if member.host == self.me.host and started(member.pid) != member.started:
                with contextlib.suppress(RuntimeError):
                    if self._store.check([f"left/{member.rank}"]):
                        del self._others[member.rank]
                        continue
                    if self._store.check(["lost"]):  # it said why, and then ended
                        return self._store.get("lost").decode()
                return self._publish(f"{member} has died")
        try:
            return self._store.get("lost").decode() if self._store.check(["lost"]) else None
        except RuntimeError as error:
            # Whoever keeps the store has ended. A rank of this host is known by its process.
            for member in self._others.values():
                if member.host == self.me.host and started(member.pid) != member.started:
                    return f"{member} has died"
            return f"the store, which rank 0 or torchrun keeps, is gone ({str(error).splitlines()[0]})"

    def _publish(self, text: str) -> str:
        with contextlib.suppress(RuntimeError):
            text = self._store.compare_set("lost", "", text).decode() or text
        return text

    def _tell(self) -> None:
        if not self._quiet and self._handles_signal and self._main.ident:
            signal.pthread_kill(self._main.ident, INTERRUPT)
        if not self._stopped.wait(GRACE_SECONDS):
            print(
                f"rank {self.me.rank} of {self.me.world_size}: {self.lost}; this rank still waits "
                f"for it after {GRACE_SECONDS:.0f} s and ends",
                file=sys.stderr,
                flush=True,
            )
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(1)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.lost and not self._quiet:
            self._quiet = True
            raise RankLost(self.lost)

    def say_left(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.me.rank}", "1")

    def say_raised(self, error: BaseException) -> None:
        self._publish(f"{self.me} raised {type(error).__name__}: {error}")

    def wait_for_others(self, seconds: float) -> None:
        """Until all others have left, or one is lost: rank 0 keeps the store that they still need."""
        deadline = time.monotonic() + seconds
        keys = [f"left/{rank}" for rank in self._others]
        with contextlib.suppress(RuntimeError):
            while not self.lost and not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.02)
