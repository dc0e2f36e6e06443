"""A worker: one engine with its model, in a process of its own (a Ray actor, or any thread of a test).

The engine runs in a thread that waits for nobody while there is work. Requests come in and tokens go out
through queues beside it: ``put`` and ``poll`` may be called from other threads at any time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from labs.serving import collector
from labs.serving.engine import Engine, Executor, Shape
from labs.serving.layout import Layout, Role
from labs.serving.policies import Running, Work
from labs.serving.request import Event, HandOver, Request


@dataclass(frozen=True)
class Model:
    """The model that every worker builds for itself. threads: that torch uses in a worker."""

    width: int
    layers: int
    context: int
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Report:
    """What a step did, with times on the host's clock. began: of its computing, when all that was handed over
    to it was stored; ended: when its events were true; free: when the worker could begin the next, having
    taken out and packed what it hands over. held: blocks in use after it. stored: (bytes, seconds) of each
    that it was handed. stayed: seconds from coming to ``ended``, of each who left with it."""

    generation: int
    events: Sequence[Event]
    shape: Shape
    began: float
    ended: float
    free: float
    held: int
    stored: Sequence[tuple[int, float]]
    stayed: Sequence[float]
    arrived: Sequence[tuple[int, float]]  # (request, when it came) of requests new in this step
    hits: int
    looked_up: int


@dataclass(frozen=True)
class Add:
    request: Request


@dataclass(frozen=True)
class Receive:
    hand_over: HandOver


@dataclass(frozen=True)
class Abort:
    number: int


@dataclass(frozen=True)
class Reset:
    """A new, empty engine. Reports from then on carry the generation."""

    layout: Layout
    role: Role
    generation: int


class Stop:
    """The last message of all."""


Message = Add | Receive | Abort | Reset | Stop


class Failed(Exception):
    """The engine raised; with the text of what it was, since not every exception travels."""


class Worker:
    """now: the clock, seconds. share, fetch: how a payload leaves (returns what is sent instead) and is
    got."""

    def __init__(
        self,
        model: Model,
        now: Callable[[], float],
        send: Callable[[Report | Failed], None],
        share: Callable[[Any], Any] = lambda payload: payload,
        fetch: Callable[[Any], Any] = lambda sent: sent,
    ) -> None:
        self.model, self.now, self.send, self.share, self.fetch = model, now, send, share, fetch
        self._inbox: queue.SimpleQueue[tuple[Message, float]] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._generation = -1
        self._arrived: list[tuple[int, float]] = []
        self._caches: dict[tuple[int, int], _Packing] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    def put(self, messages: Sequence[Message]) -> None:
        """For the engine; what was handed over is fetched here, beside it. All of them, or an error and
        none."""
        taken: list[Message] = []
        for message in messages:
            if isinstance(message, Receive):
                payload = self.fetch(message.hand_over.payload)
                message = Receive(replace(message.hand_over, payload=payload))
            taken.append(message)
        came = self.now()
        for message in taken:
            self._inbox.put((message, came))

    def held(self) -> int:
        """Blocks in use; for whoever knows that no request is being served."""
        return self._engine.pool.held if self._engine is not None else 0

    # --- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            import torch

            torch.set_num_threads(self.model.threads)
            while self._take():
                if self._engine is not None:
                    self._step(self._engine)
        except BaseException as error:
            self.send(Failed(f"{type(error).__name__}: {error}"))

    def _take(self) -> bool:
        """Takes what has arrived, waiting while there is nothing to do. False: stop."""
        while True:
            idle = self._engine is None or self._engine.idle
            try:
                message, came = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(message, Stop):
                return False
            self._handle(message, came)

    def _handle(self, message: Message, came: float) -> None:
        if isinstance(message, Reset):
            executor = self._executor(message.layout)
            self._engine = message.layout.engine(message.role, executor)
            self._generation, self._arrived = message.generation, []
            self._say_what_is_held(self._engine)
        elif self._engine is None:
            raise RuntimeError("a worker is given its layout before it is given requests")
        elif isinstance(message, Add):
            self._engine.add(message.request, came)
            self._arrived.append((message.request.number, came))
        elif isinstance(message, Receive):
            self._engine.receive(message.hand_over, came)
            self._arrived.append((message.hand_over.request.number, came))
        elif isinstance(message, Abort):
            self._engine.abort(message.number)
            if self._engine.idle:  # no step will tell
                self._say_what_is_held(self._engine)

    def _say_what_is_held(self, engine: Engine) -> None:
        now, held = self.now(), engine.pool.held
        self.send(
            Report(
                self._generation, (), Shape(), now, now, now, held, (), (), (), engine.hits, engine.looked_up
            )
        )

    def _executor(self, layout: Layout) -> _Packing:
        """The model with a cache of this size; kept, since a cache has no content that an empty pool would
        name."""
        from labs.serving.paged import PagedGPT
        from labs.serving.weights import serving_model

        key = (layout.blocks, layout.block_size)
        if key not in self._caches:
            model = serving_model(self.model.width, self.model.layers, self.model.context, self.model.seed)
            self._caches = {key: _Packing(PagedGPT(model, *key), self.now)}
            self._warm(self._caches[key], min(4, layout.capacity - 1))
            collector.settle()
        return self._caches[key]

    def _warm(self, executor: _Packing, tokens: int) -> None:
        """A prompt and a decode, so that no request pays for loading what they need."""
        running = Running(Request(0, (0,) * tokens, 1), 0.0, [0] * (tokens + 1), blocks=[0, 1, 2, 3])
        for start, count in ((0, tokens), (tokens, 1)):
            executor.run([Work(running, start, count)])

    def _step(self, engine: Engine) -> None:
        packing = cast(_Packing, engine.executor)
        packing.taken, packing.stored = 0.0, []
        began = self.now()
        step = engine.step()
        if step is None:
            return
        # What was handed over is stored before anything is computed; what leaves is taken out afterwards.
        began, ended = began + sum(seconds for _, seconds in packing.stored), self.now() - packing.taken
        events = [
            replace(event, payload=self.share(event.payload)) if isinstance(event, HandOver) else event
            for event in step.events
        ]
        arrived, self._arrived = self._arrived, []
        self.send(
            Report(
                self._generation,
                events,
                step.shape,
                began,
                ended,
                self.now(),
                step.held,
                packing.stored,
                [ended - came for came in step.arrived],
                arrived,
                engine.hits,
                engine.looked_up,
            )
        )


class _Packing:
    """An executor that knows how long it took keys and values out, and stored those it was handed: the work
    of sender and receiver, and no part of what a step computes. taken: seconds; stored: (bytes, seconds)."""

    def __init__(self, executor: Executor, now: Callable[[], float]) -> None:
        self.executor, self.now, self.run = executor, now, executor.run
        self.taken, self.stored = 0.0, list[tuple[int, float]]()

    def take_out(self, blocks: Sequence[int], tokens: int) -> tuple[Any, int]:
        began = self.now()
        found = self.executor.take_out(blocks, tokens)
        self.taken += self.now() - began
        return found

    def put_in(self, blocks: Sequence[int], payload: Any, skipped: int) -> int:
        began = self.now()
        size = self.executor.put_in(blocks, payload, skipped)
        self.stored.append((size, self.now() - began))
        return size
