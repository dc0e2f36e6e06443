"""The engine: requests in, tokens out, one step at a time. It knows no clock, no process and no network.

  queue -> admitted when its blocks are free -> reads its prompt -> writes a token a step -> gone

It is told when requests came, and computing is an ``Executor``, so that the very same code serves on a worker
and runs in the simulator. A sequence is admitted when every block that it can ever need is free: none is
thrown out later, and what was accepted is finished (vLLM admits earlier and recomputes what it throws out).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from labs.serving.blocks import BlockPool
from labs.serving.policies import Policy, Running, Work
from labs.serving.request import Event, HandOver, Request, Token


class Executor(Protocol):
    """Computes: the model on a worker, nothing in the simulator."""

    def run(self, works: Sequence[Work]) -> Sequence[int]:
        """Keys and values of all works' tokens are stored; the next token of each work that writes, in
        order."""

    def take_out(self, blocks: Sequence[int], tokens: int) -> tuple[Any, int]:
        """(keys and values of the first ``tokens`` in these blocks, their bytes), to be sent."""

    def put_in(self, blocks: Sequence[int], payload: Any, skipped: int) -> int:
        """The payload's blocks from the one numbered ``skipped`` on are stored in ``blocks``; their bytes."""


@dataclass(frozen=True)
class Shape:
    """What a step computed, as costs see it.

    prompts, new: pieces of prompts and tokens in them. pairs: (query, key) pairs of these. earlier: keys of
    earlier pieces that they attend to. decodes, context: sequences that compute one token, and their keys.
    reading_anew: 1 where it has prompts and the step before had none, or the worker had nothing to do: what
    reading needs is no longer near the core. writing_anew: likewise, it decodes and the step before did not
    only that.
    """

    prompts: int = 0
    new: int = 0
    pairs: int = 0
    earlier: int = 0
    decodes: int = 0
    context: int = 0
    reading_anew: int = 0
    writing_anew: int = 0


def shape_of(works: Sequence[Work]) -> Shape:
    pieces = [work for work in works if work.count > 1]
    single = [work for work in works if work.count == 1]
    return Shape(
        prompts=len(pieces),
        new=sum(work.count for work in pieces),
        pairs=sum(work.count * work.start + work.count * (work.count + 1) // 2 for work in pieces),
        earlier=sum(work.start for work in pieces),
        decodes=len(single),
        context=sum(work.start + 1 for work in single),
    )


@dataclass(frozen=True)
class Step:
    """What a step did. arrived: when those came who left with it. held: blocks in use after it."""

    events: Sequence[Event]
    shape: Shape
    arrived: Sequence[float]
    held: int


class Engine:
    """One worker's sequences.

    policy, budget: see ``labs.serving.policies``. most: sequences at once. hands_over: it only reads prompts,
    and a sequence leaves with its first token.
    """

    def __init__(
        self,
        executor: Executor,
        pool: BlockPool,
        policy: Policy,
        budget: int,
        most: int = 64,
        hands_over: bool = False,
    ) -> None:
        if budget < 1 or most < 1:
            raise ValueError(f"budget={budget} tokens a step and most={most} sequences must be at least 1")
        self.executor, self.pool, self.policy = executor, pool, policy
        self.budget, self.most, self.hands_over = budget, most, hands_over
        self.queue: deque[Running] = deque()
        self.handed: deque[tuple[Running, Any]] = deque()  # from other workers, waiting for blocks
        self.active: list[Running] = []
        self.hits = self.looked_up = 0  # prompt tokens found in the pool, of all
        self._before: Shape | None = None  # of the step before, if there was work ever since

    @property
    def idle(self) -> bool:
        return not (self.queue or self.handed or self.active)

    def add(self, request: Request, now: float) -> None:
        """Into the queue. ValueError: it would not fit if it were alone."""
        check_fits(request, self.pool.blocks * self.pool.block_size)
        self.queue.append(Running(request, now, list(request.prompt)))

    def receive(self, hand_over: HandOver, now: float) -> None:
        """A sequence that another worker has read; its last token is to be computed here."""
        request = hand_over.request
        running = Running(request, now, list(request.prompt), computed=len(request.prompt) - 1)
        self.handed.append((running, hand_over.payload))

    def abort(self, number: int) -> None:
        """Forgets the request wherever it stands; nothing happens if it is not here."""
        self.queue = deque(each for each in self.queue if each.request.number != number)
        self.handed = deque(each for each in self.handed if each[0].request.number != number)
        for running in [each for each in self.active if each.request.number == number]:
            self._leave(running)

    def step(self) -> Step | None:
        """One step; its events are true when it ends. None: there is nothing to do."""
        self._admit()
        reading = [each for each in self.active if each.missing > 1]
        writing = [each for each in self.active if each.missing == 1]
        works = self.policy(reading, writing, self.budget)
        if not works:
            return None
        tokens = iter(self.executor.run(works))
        events: list[Event] = []
        arrived: list[float] = []
        for work in works:
            writes = work.writes
            self._computed(work)
            if writes:
                events += self._write(work.running, next(tokens))
                if work.running not in self.active:
                    arrived.append(work.running.arrived)
        shape, before = shape_of(works), self._before
        shape = replace(
            shape,
            reading_anew=int(shape.prompts > 0 and not (before and before.prompts)),
            writing_anew=int(shape.decodes > 0 and (not before or before.prompts > 0)),
        )
        self._before = None if self.idle else shape
        return Step(events, shape, arrived, self.pool.held)

    def _admit(self) -> None:
        while self.handed and len(self.active) < self.most:
            running, payload = self.handed[0]
            shared = self._hold(running)
            if shared is None:
                break
            self.handed.popleft()
            self.executor.put_in(running.blocks[shared : self.pool.needed(running.computed)], payload, shared)
            running.published = shared
            self._publish(running)
            self.active.append(running)
        while self.queue and not self.handed and len(self.active) < self.most:
            running = self.queue[0]
            shared = self._hold(running)
            if shared is None:
                break
            self.queue.popleft()
            running.published = shared
            running.computed = shared * self.pool.block_size
            self.hits += running.computed
            self.looked_up += len(running.tokens)
            self.active.append(running)

    def _hold(self, running: Running) -> int | None:
        """Holds all blocks that the sequence can need; how many of them have its tokens' keys already."""
        request = running.request
        # The last token of all is written and never read.
        most = len(request.prompt) if self.hands_over else request.total - 1
        shared = self.pool.match(running.tokens[:-1])
        blocks = self.pool.hold(shared, self.pool.needed(most) - len(shared))
        if blocks is None:
            return None
        running.blocks = blocks
        return len(shared)

    def _computed(self, work: Work) -> None:
        work.running.computed += work.count
        self._publish(work.running)

    def _publish(self, running: Running) -> None:
        filled = running.computed // self.pool.block_size
        self.pool.publish(running.blocks, running.tokens, running.published, filled)
        running.published = max(running.published, filled)

    def _write(self, running: Running, token: int) -> list[Event]:
        request, place = running.request, running.written
        running.tokens.append(token)
        finished = "stop" if token in request.stop else "length" if place + 1 == request.output else ""
        events: list[Event] = [Token(request.number, token, place, finished)]
        if finished:
            self._leave(running)
        elif self.hands_over:
            payload, size = self.executor.take_out(running.blocks, running.computed)
            self._leave(running)
            events.append(HandOver(request.after([token]), payload, size))
        return events

    def _leave(self, running: Running) -> None:
        self.active.remove(running)
        self.pool.release(running.blocks)


def check_fits(request: Request, capacity: int, of: str = "the cache") -> None:
    """ValueError where the request needs more than ``capacity`` tokens of keys and values. of: what has no
    more."""
    if request.total - 1 > capacity:
        raise ValueError(
            f"a prompt of {len(request.prompt)} tokens and {request.output} more need room for "
            f"{request.total - 1} tokens of keys and values; {of} has {capacity}"
        )
