"""The lab's workers: Ray actors that stay for all variants of a process, and the load that is put on them.

The service runs on an event loop in a thread, so that a variant's step is an ordinary function. Load is
open-loop: when a request comes was decided before, whether the service is ready for it or not; how late the
generator was is part of the result.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from labs.lab import Recorder
from labs.serving import collector
from labs.serving.config import Config
from labs.serving.costs import Fitted
from labs.serving.counted import Counters, Seen
from labs.serving.layout import Layout
from labs.serving.measures import Served
from labs.serving.request import Request
from labs.serving.service import Service
from labs.serving.trace import Arrival
from labs.serving.worker import Model

T = TypeVar("T")
PATIENCE_S = 300.0  # for anything, and for a block of load after its last request is due
LEAD_S = 0.05  # before the first request is due
SPIN_S = 2e-3  # an event loop's timer counts milliseconds and is late by so much; the rest is waited awake


@dataclass(frozen=True)
class Block:
    """A block of load, served by so many workers. leaked: blocks of keys and values still held afterwards."""

    served: Sequence[Served]
    counters: Counters
    seen: Seen
    span: float
    leaked: int
    workers: int


class Fleet:
    """Workers of a model, started once; ``serve`` puts a block of load on them under a layout. fitted: what
    calibration found, or why it was refused; empty before."""

    def __init__(self, config: Config, recorder: Recorder) -> None:
        from labs.concurrency import cluster
        from labs.serving.actors import Actor

        self.now = recorder.now
        self.fitted: Fitted | str = ""
        began = self.now()
        cluster.cluster(config.workers, recorder)
        self.model = Model(config.width, config.layers, config.context, config.seed)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="service")
        self.thread.start()
        start: Callable[[], Any] = lambda: Actor(self.model, recorder.now)  # noqa: E731

        async def make() -> Service:
            service = Service(start, config.layout("chunked"), recorder.now, 10**6, config.context)
            await service.ready()
            return service

        self.service = self.run(make())
        collector.settle()
        self.start_s = self.now() - began

    def run(self, work: Coroutine[Any, Any, T], wait_s: float = PATIENCE_S) -> T:
        """On the service's loop. TimeoutError, naming what was waited for."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(wait_s)
        except TimeoutError:
            future.cancel()
            left = len(self.service.dispatcher.requests)
            raise TimeoutError(
                f"waited {wait_s:g} s for the workers; {left} requests are not served"
            ) from None

    def serve(self, layout: Layout, trace: Sequence[Arrival], only: int | None = None) -> Block:
        """The whole trace, each request when it is due. only: the one worker that gets requests. TimeoutError
        where it is not served PATIENCE_S after the last is due; the workers then have none of it any more."""
        return self.run(self._serve(layout, trace, only), trace[-1].at + PATIENCE_S)

    def close(self) -> None:
        self.run(self.service.close(0.0), 60.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        if not self.thread.is_alive():
            self.loop.close()

    async def _serve(self, layout: Layout, trace: Sequence[Arrival], only: int | None) -> Block:
        service = self.service
        service.watched = True  # also of the change: workers rest from then on
        await service.change(layout)
        service.dispatcher.only = only  # until the next change
        begin = self.now() + LEAD_S
        tasks: list[asyncio.Task[Served]] = []
        gc.disable()  # all reports are kept, and the collector would stop everybody to look at them
        try:
            for arrival in trace:
                due = begin + arrival.at
                await self._until(due)
                tasks.append(asyncio.ensure_future(self._one(arrival.request, due)))
                await asyncio.sleep(0)  # it is submitted now
            served = list(await asyncio.gather(*tasks))
        finally:
            gc.enable()
            service.watched = False
            for task in tasks:
                task.cancel()
        span = self.now() - begin
        leaked = await service.held()
        return Block(served, service.counters, service.seen, span, leaked, layout.workers)

    async def _until(self, due: float) -> None:
        wait = due - self.now()
        if wait > SPIN_S:
            await asyncio.sleep(wait - SPIN_S)
        while self.now() < due:
            await asyncio.sleep(0)

    async def _one(self, request: Request, due: float) -> Served:
        found = Served(request.number, due, self.now())
        stream = self.service.submit(request)
        try:
            async for token, at in stream:
                found.tokens.append(token.token)
                found.at.append(at)
        finally:
            stream.cancel()
        return found


_fleets: dict[Model, Fleet] = {}


def fleet(config: Config, recorder: Recorder) -> Fleet:
    """The process's workers of this model, started at the first call; those of another model are ended."""
    model = Model(config.width, config.layers, config.context, config.seed)
    there = _fleets.get(model)
    if there is not None and len(there.service.workers) == config.workers:
        return there
    shut_down()
    _fleets[model] = Fleet(config, recorder)
    atexit.register(shut_down)  # after the cluster's own: exit handlers run in reverse, the actors end first
    return _fleets[model]


def shut_down() -> None:
    """Ends the workers; nothing happens when there are none."""
    atexit.unregister(shut_down)
    while _fleets:
        _fleets.popitem()[1].close()
