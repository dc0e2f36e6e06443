"""The service: takes requests, streams their tokens, and loses none that it accepted. It knows neither HTTP
nor Ray.

A task for each worker waits for its reports. What a lost worker had is read again elsewhere, with what was
written so far behind the prompt; tokens that were on their way twice are dropped by their place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from labs.serving.actors import START_S, LostWorker
from labs.serving.counted import Counters, Seen, Trip
from labs.serving.dispatch import Dispatcher, Overloaded
from labs.serving.engine import check_fits
from labs.serving.layout import Layout
from labs.serving.mailbox import Held, Mailbox
from labs.serving.request import HandOver, Request, Token
from labs.serving.worker import Abort, Add, Receive, Report, Reset

STARTS = 5
"""Replacements for one worker after which it is given up, if none of them has finished a request: something
kills it each time."""
ATTEMPTS = 5
"""Workers that a request is lost with until it is given up: it may be what kills them."""


class Closing(Exception):
    """The service takes no more requests: it is shutting down, or no worker of a role is left."""


class Unfinished(Exception):
    """This request was accepted and cannot be finished; others can."""


class Stream:
    """The tokens of one request, as they come. ``async for token in stream``; ``cancel`` gives it up."""

    def __init__(self, service: Service, number: int) -> None:
        self._service, self.number = service, number
        self.tokens: asyncio.Queue[tuple[Token, float] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[Token, float]]:
        """(token, when it came, on the service's clock)."""
        while True:
            item = await self.tokens.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item[0].finished:
                return

    def cancel(self) -> None:
        """Nobody reads it any more: its blocks are freed. Nothing happens when it is done."""
        self._service._cancel(self.number)


class Service:
    """start: makes a worker. now: the clock. limit: requests in the house at once, more are refused. context:
    the longest sequence that the model takes."""

    def __init__(
        self,
        start: Callable[[], Held],
        layout: Layout,
        now: Callable[[], float],
        limit: int = 256,
        context: int = 10**9,
    ) -> None:
        self._start, self.layout, self.now, self.context = start, layout, now, context
        self.limit = limit
        self.dispatcher = Dispatcher(layout.roles, limit)
        self._mail = [Mailbox(start(), self._again) for _ in layout.roles]
        self.counters, self.seen = Counters(), Seen()
        self.occupancy = [0.0] * len(layout.roles)
        self.hits = [(0, 0)] * len(layout.roles)  # (found, looked up) prompt tokens
        self.watched = False  # whether ``seen`` is written
        self._streams: dict[int, Stream] = {}
        self._sent: dict[int, tuple[int, float]] = {}  # request -> (bytes or 0, when it was posted)
        self._stranded: deque[int | HandOver] = deque()
        self._starts = [0] * len(layout.roles)  # since a worker in this place has finished something
        self._given_up: set[int] = set()
        self._generation = 0
        self._unset: set[int] = set()  # workers that have not built their engine yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self.failure: Exception | None = None  # why no request can be served any more

    @property
    def workers(self) -> list[Held]:
        return [box.worker for box in self._mail]

    async def ready(self) -> None:
        """All workers are there and know their role."""
        await asyncio.gather(*(worker.process() for worker in self.workers))
        for index in range(len(self.workers)):
            self._background(self._listen(index))
        await self._reset()

    async def change(self, layout: Layout) -> None:
        """Another policy on the same workers, with empty caches. ValueError while requests are served, or
        where the number of workers would change."""
        if self.dispatcher.requests or layout.workers != sum(self.dispatcher.alive):
            raise ValueError(
                f"{len(self.dispatcher.requests)} requests are being served by {sum(self.dispatcher.alive)} "
                "workers; a layout changes between requests, for as many workers"
            )
        self.layout, self._generation = layout, self._generation + 1
        self.dispatcher = Dispatcher(layout.roles, self.limit)
        self.counters, self.seen = Counters(), Seen()
        await self._reset()

    async def _reset(self) -> None:
        """Empty engines of this layout on all workers; LostWorker where one does not come up."""
        self._unset = set(range(len(self.workers)))
        for index, role in enumerate(self.layout.roles):
            self._mail[index].post(Reset(self.layout, role, self._generation))
        end = self.now() + START_S
        while self._unset:
            if self.failure is not None:
                raise self.failure
            if self.now() > end:
                raise LostWorker(f"workers {sorted(self._unset)} have not built their model in {START_S:g} s")
            await asyncio.sleep(0.005)

    async def held(self) -> int:
        """Blocks in use on all workers, once their last messages have arrived: 0 where nobody is served."""
        while not all(box.empty for box in self._mail):
            await asyncio.sleep(0.001)
        return sum(await asyncio.gather(*(worker.held() for worker in self.workers)))

    def submit(self, request: Request) -> Stream:
        """Accepts the request. Overloaded, Closing or ValueError (it cannot fit): it was not accepted."""
        if self._closing:
            raise Closing("the service is shutting down")
        if self.failure is not None:
            raise Closing(str(self.failure))
        check_fits(request, self.layout.capacity)
        check_fits(request, self.context, "the model's context")
        if request.number in self._streams:
            raise ValueError(f"request {request.number} is being served already")
        try:
            index = self.dispatcher.submit(request)
        except Overloaded:
            self.counters.refused += 1
            raise
        self.counters.accepted += 1
        stream = self._streams[request.number] = Stream(self, request.number)
        if index is None:
            self._stranded.append(request.number)
        else:
            self._sent[request.number] = (0, self.now())
            self._mail[index].post(Add(request))
        return stream

    async def close(self, wait_s: float, hurry: Callable[[], bool] = lambda: False) -> int:
        """No new requests; those in the house have ``wait_s`` to finish, or until ``hurry``. How many did
        not: their streams end with Closing. The workers' processes end."""
        self._closing = True
        end = self.now() + wait_s
        while self._streams and self.failure is None and self.now() < end and not hurry():
            await asyncio.sleep(0.02)
        left = len(self._streams)
        for stream in list(self._streams.values()):
            stream.tokens.put_nowait(Closing("the service has shut down before this request was finished"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(box.close() for box in self._mail), return_exceptions=True)
        for worker in self.workers:
            with contextlib.suppress(Exception):  # one that does not end keeps no other from ending
                await worker.end()
        return left

    # --- messages ---------------------------------------------------------------------------------

    async def _listen(self, index: int) -> None:
        worker = self._mail[index].worker
        try:
            while True:
                for report in await worker.poll():
                    if report.generation == self._generation:
                        self._take(index, report)
        except LostWorker as error:
            lost = error
        except Exception as error:  # the engine or the service itself failed: it cannot go on
            self._fail(Closing(f"worker {index} failed: {error}"))
            return
        await self._replace(index, lost)

    def _take(self, index: int, report: Report) -> None:
        now = self.now()
        self._unset.discard(index)
        if self.watched:
            self.seen.reports.append((index, report))
            self.seen.delivers.append(now - report.free)
        for number, arrived in report.arrived:
            size, sent = self._sent.pop(number, (0, arrived))
            if self.watched:
                self.seen.trips.append(Trip(size, sent, arrived, len(self.seen.reports) - 1))
        self.occupancy[index] = report.held / self.layout.blocks
        self.hits[index] = (report.hits, report.looked_up)
        for event in report.events:
            if isinstance(event, HandOver):
                self._hand_over(index, event, report)
            elif self.dispatcher.token(event):
                self.counters.tokens += 1
                self._streams[event.number].tokens.put_nowait((event, now))
                if event.finished:
                    self._starts[index] = 0
                    self.counters.finished += 1
                    del self._streams[event.number]

    def _hand_over(self, source: int, event: HandOver, report: Report) -> None:
        number, sent = event.request.number, self.now()
        event = replace(event, payload=self._mail[source].worker.pick(event.payload))
        if number not in self._streams:
            return
        index = self.dispatcher.hand_over(event)
        if index is None:
            self._stranded.append(event)
            return
        self._starts[source] = 0
        self.counters.hand_overs += 1
        self.counters.handed_bytes += event.size_bytes
        if self.watched:
            count = sum(isinstance(each, HandOver) for each in report.events)
            self.seen.packs.append((event.size_bytes, (report.free - report.ended) / count))
        self._sent[number] = (event.size_bytes, sent)
        self._mail[index].post(Receive(event))

    def _cancel(self, number: int) -> None:
        if number not in self._streams:
            return
        index = self.dispatcher.forget(number)
        del self._streams[number]
        self.counters.aborted += 1
        if index is not None:
            self._mail[index].post(Abort(number))

    # --- lost workers -----------------------------------------------------------------------------

    async def _replace(self, index: int, error: Exception) -> None:
        """Another worker in the place of a lost one; what it had goes on elsewhere meanwhile."""
        self.counters.lost_workers += 1
        for number in self.dispatcher.lost(index):
            self._again(number)
        await self._mail[index].close()
        with contextlib.suppress(Exception):
            await self._mail[index].worker.end()
        while self._starts[index] < STARTS:
            self._starts[index] += 1
            if (worker := await self._another(index)) is None:
                continue
            self._mail[index] = Mailbox(worker, self._again)
            self.dispatcher.restored(index)
            self._background(self._listen(index))
            stranded, self._stranded = self._stranded, deque()
            for item in stranded:
                if isinstance(item, HandOver):
                    self._resume(item)
                else:
                    self._again(item)
            return
        self._given_up.add(index)
        role = self.layout.roles[index]
        if all(each in self._given_up for each, other in enumerate(self.layout.roles) if other == role):
            self._fail(Closing(f"worker {index} was started {STARTS} times and lost each time: {error}"))

    async def _another(self, index: int) -> Held | None:
        """A new worker with an empty engine; None where it does not come up."""
        worker = None
        try:
            worker = self._start()
            await worker.process()
            await worker.put([Reset(self.layout, self.layout.roles[index], self._generation)])
            return worker
        except Exception:
            if worker is not None:
                with contextlib.suppress(Exception):
                    await worker.end()
            return None

    def _resume(self, event: HandOver) -> None:
        if event.request.number in self._streams:
            index = self.dispatcher.hand_over(event)
            if index is None:
                self._stranded.append(event)
            else:
                self._mail[index].post(Receive(event))

    def _again(self, number: int) -> None:
        if number not in self._streams:
            return
        if self.dispatcher.requests[number].attempts >= ATTEMPTS:
            self.dispatcher.forget(number)
            reason = f"request {number} was given up: it was lost with a worker {ATTEMPTS} times"
            self._streams.pop(number).tokens.put_nowait(Unfinished(reason))
            self.counters.failed += 1
            return
        index, request = self.dispatcher.retry(number)
        self.counters.retried += 1
        if index is None:
            self._stranded.append(number)
        else:
            self._mail[index].post(Add(request))

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for stream in self._streams.values():
            stream.tokens.put_nowait(error)

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
