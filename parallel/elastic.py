"""What makes torchrun's restart reliable, and a dead rank an error instead of a hang.

    with elastic.join("gloo") as world:
        ...                                        # torch.distributed is initialised
        step = checkpoint.load(...) if checkpoint.latest(...) else 0

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 train.py

Why the plain command is not enough: since 2.5 torchrun gives workers the store of its own rendezvous, the
same in every attempt (pytorch 135712, 167288). Gloo publishes the addresses of its ranks there, so after a
restart a rank may find those of the previous attempt, connect to nobody, and use the next restart up. (The
cure without this file: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment.)

`join` gives each attempt a part of the store of its own. The restart count will not do for its name: with
several nodes each agent counts for itself. So ranks agree on one: everyone draws a ticket, with a random
token; rank 0 answers each ticket by its own token; who is alive acknowledges, what an earlier attempt left
does not. When all ranks have acknowledged, rank 0's token is the world's name. The same exchange tells who
is missing, who counts ranks differently, and where each process lives, which `parallel.liveness` then
watches.
"""

import atexit
import json
import os
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from parallel.liveness import Member, RankLost, Watch

__all__ = ["RankLost", "World", "join"]

POLL_SECONDS = 0.02
NEWS_SECONDS = 1.5  # a connection breaks before the process that held it is seen to be gone


@dataclass(frozen=True)
class Environment:
    """What torchrun, or whoever starts the ranks, says in the environment."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    agent_store: bool  # torchrun keeps the store; else rank 0 does

    @classmethod
    def read(cls) -> "Environment":
        """ValueError names the variable that is missing or wrong."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise ValueError(
                f"the environment lacks {', '.join(missing)}: torchrun sets {', '.join(names)} for each rank"
            )
        world_size = _integer("WORLD_SIZE", 1)
        return cls(
            _integer("RANK", 0, world_size - 1),
            world_size,
            _integer("LOCAL_RANK", 0, world_size - 1) if "LOCAL_RANK" in os.environ else 0,
            os.environ["MASTER_ADDR"],
            _integer("MASTER_PORT", 1, 65535),
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def connect(self, seconds: float, keep: bool = False) -> dist.TCPStore:
        """A connection to the store; ``keep``: this process keeps it."""
        return dist.TCPStore(
            self.address,
            self.port,
            is_master=keep,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )


def _integer(name: str, low: int, high: int | None = None) -> int:
    text = os.environ[name]
    limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        raise ValueError(f"{name} is an integer {limits}, not {text!r}")
    return int(text)


class World:
    """The ranks that have joined. Leave it with ``with``, by `leave`, or by ending the process."""

    def __init__(
        self, here: Environment, store: dist.Store | None, watch: Watch | None, timeout: float
    ) -> None:
        self.rank, self.world_size, self.local_rank = here.rank, here.world_size, here.local_rank
        self._store = store  # which lives while the world does
        self._watch, self._timeout = watch, timeout
        self._keeps_store, self._left = not here.agent_store and here.rank == 0, False
        atexit.register(self._at_exit)

    def leave(self, error: BaseException | None = None) -> None:
        """Destroy the process group and stop watching; ``error`` is told to the other ranks.

        Raises RankLost, from ``error``, if ``error`` came of a rank that is gone.
        """
        if self._left:
            return
        self._left = True
        atexit.unregister(self._at_exit)
        if isinstance(error, SystemExit) and not error.code:
            error = None
        lost = None
        if self._watch:
            # A collective over a broken connection raises before, or instead of, the watch.
            lost = self._watch.quiet(NEWS_SECONDS if isinstance(error, RuntimeError) else 0.0)
            if error is None:
                self._watch.say_left()
            elif lost is None:
                self._watch.say_raised(error)
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._watch:
            if self._keeps_store and self._store:
                self._watch.wait_for_others(self._timeout if error is None else 2 * NEWS_SECONDS)
            self._watch.stop()
        self._store = None
        if lost and not isinstance(error, RankLost):
            raise RankLost(lost) from error

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(error)

    def _at_exit(self) -> None:
        self.leave(getattr(sys, "last_value", None))


def join(backend: str, timeout: float = 600.0, join_timeout: float = 60.0) -> World:
    """Initialise torch.distributed for the ranks that torchrun (or any other launcher) has started.

    timeout: seconds that a collective may wait. join_timeout: seconds that a rank waits here for the others.
    Without RANK and WORLD_SIZE in the environment this process is a world of one.

    Afterwards a rank that dies or raises is a `RankLost` that names it on all others within seconds, wherever
    they are; one that waits where nothing reaches it ends with that message on stderr.

    Raises ValueError for an environment that is wrong or that ranks disagree on, by variable; TimeoutError
    that names who did not join.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        here = Environment(0, 1, 0, "", 0, False)
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout)
        )
        return World(here, None, None, timeout)
    here = Environment.read()
    deadline = time.monotonic() + join_timeout
    while True:
        store = _store(here, join_timeout, deadline)
        me = Member.of_this_process(here.rank, here.world_size, secrets.token_hex(8))
        try:
            name, members = _gather(me, store, join_timeout, deadline)
            break
        except RuntimeError:  # it was the store of the last world, whose rank 0 has closed it since
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
    prefix = f"perflab/{name}"
    watch = Watch(me, members, lambda: dist.PrefixStore(f"{prefix}/liveness", here.connect(join_timeout)))
    watch.start()
    world = World(here, store, watch, timeout)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, store),
            rank=here.rank,
            world_size=here.world_size,
            timeout=timedelta(seconds=timeout),
        )
    except BaseException as error:
        world.leave(error)
        raise
    return world


def _store(here: Environment, join_timeout: float, deadline: float) -> dist.TCPStore:
    keep = not here.agent_store and here.rank == 0
    place = f"{here.address}:{here.port} (MASTER_ADDR:MASTER_PORT)"
    while True:
        try:
            return here.connect(max(1.0, deadline - time.monotonic()), keep)
        except RuntimeError as error:
            if time.monotonic() < deadline:  # the last attempt's rank 0 may still hold the port
                time.sleep(10 * POLL_SECONDS)
                continue
            keeper = "torchrun's agent" if here.agent_store else "rank 0"
            reason = str(error).splitlines()[0]
            what = f"rank 0 cannot listen at {place}" if keep else f"{keeper} did not come to {place}"
            raise TimeoutError(f"{what} within {join_timeout:g} s: {reason}") from error


def _gather(me: Member, store: dist.Store, join_timeout: float, deadline: float) -> tuple[str, list[Member]]:
    """(the name of this attempt's world, its members in the order of ranks)."""
    tickets = dist.PrefixStore("perflab/join", store)
    number = tickets.add("tickets", 1)
    tickets.set(f"ticket/{number}", me.encode())
    if me.rank == 0:
        members = _invite(me, tickets, number, join_timeout, deadline)
        tickets.set(f"world/{me.token}", json.dumps({"members": [member.encode() for member in members]}))
        return me.token, members
    world = ""
    # Rank 0 began its wait later, perhaps, and it is the one that knows who is missing.
    while time.monotonic() < deadline + join_timeout:
        if tickets.check([f"answer/{me.token}"]):
            world = tickets.get(f"answer/{me.token}").decode()
            tickets.set(f"here/{world}/{me.token}", "1")
            if tickets.check([f"world/{world}"]):
                answer = json.loads(tickets.get(f"world/{world}"))
                if "members" not in answer:
                    raise (ValueError if answer["wrong"] else TimeoutError)(answer["error"])
                members = [Member.decode(text.encode()) for text in answer["members"]]
                if me not in members:
                    raise ValueError(f"{me} came to a world that is complete: {', '.join(map(str, members))}")
                return world, members
        elif time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 of {me.world_size} did not join within {join_timeout:g} s; {me} waited"
            )
        time.sleep(POLL_SECONDS)
    raise TimeoutError(
        f"rank 0 of {me.world_size} joined and then fell silent; {me} waited {2 * join_timeout:g} s"
    )


def _invite(me: Member, tickets: dist.Store, mine: int, join_timeout: float, deadline: float) -> list[Member]:
    """Rank 0's side: the members, once all have acknowledged. What is wrong, all who joined are told."""
    invited: dict[int, Member] = {}
    joined = {0: me}
    error: ValueError | TimeoutError | None = None
    while error is None and len(joined) < me.world_size:
        for number in range(1, tickets.add("tickets", 0) + 1):
            # A ticket may have been drawn by somebody who was killed before writing on it.
            if number not in invited and number != mine and tickets.check([f"ticket/{number}"]):
                invited[number] = Member.decode(tickets.get(f"ticket/{number}"))
                tickets.set(f"answer/{invited[number].token}", me.token)
        for number, member in invited.items():
            if member.rank == 0:
                if number > mine:
                    error = ValueError(f"two processes have RANK=0: {me} and {member}")
            elif joined.get(member.rank) != member and tickets.check([f"here/{me.token}/{member.token}"]):
                if member.world_size != me.world_size:
                    error = ValueError(
                        f"WORLD_SIZE is {me.world_size} for {me} and {member.world_size} for {member}"
                    )
                elif member.rank in joined:
                    error = ValueError(
                        f"two processes have RANK={member.rank}: {joined[member.rank]} and {member}"
                    )
                joined[member.rank] = member
        if error is None and len(joined) < me.world_size and time.monotonic() > deadline:
            missing = [str(rank) for rank in range(me.world_size) if rank not in joined]
            who = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {me.world_size}"
            here = "; ".join(str(joined[rank]) for rank in sorted(joined))
            error = TimeoutError(f"{who} did not join within {join_timeout:g} s; there are {here}")
        time.sleep(POLL_SECONDS)
    if error:
        told = {"error": str(error), "wrong": isinstance(error, ValueError)}
        tickets.set(f"world/{me.token}", json.dumps(told))
        time.sleep(0.5)  # if this process keeps the store, the others still have to read it
        raise error
    return [joined[rank] for rank in range(me.world_size)]
