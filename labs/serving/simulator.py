"""The engine and the dispatcher on a virtual clock: what would be measured, from the costs of a step.

Nothing of the engine is modelled: it is the code that serves, with an executor that computes nothing. What is
modelled is how long a step takes (``labs.serving.costs``) and how long messages travel.

Workers take caches, memory and cores from each other: all steps of a kind go on at one speed, which falls
with every worker that is at work (processor sharing). On a clock that runs at that speed each of them ends at
a time that is known when it begins.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from labs.serving.costs import UNDISTURBED, Costs, Disturbance, Wires, rested
from labs.serving.dispatch import Dispatcher
from labs.serving.engine import Engine, Step
from labs.serving.layout import Layout
from labs.serving.measures import Served
from labs.serving.policies import Work
from labs.serving.request import HandOver, Token
from labs.serving.trace import Arrival


class Nothing:
    """An executor that computes nothing: every token is 0. kv_bytes: of a token's keys and values. stored:
    bytes of each that was handed over to it."""

    def __init__(self, block_size: int, kv_bytes: int) -> None:
        self.block_size, self.kv_bytes = block_size, kv_bytes
        self.stored: list[int] = []

    def run(self, works: Sequence[Work]) -> list[int]:
        return [0] * sum(work.writes for work in works)

    def take_out(self, blocks: Sequence[int], tokens: int) -> tuple[Any, int]:
        return None, -(-tokens // self.block_size) * self.block_size * self.kv_bytes

    def put_in(self, blocks: Sequence[int], payload: Any, skipped: int) -> int:
        self.stored.append(len(blocks) * self.block_size * self.kv_bytes)
        return self.stored[-1]


@dataclass
class Simulated:
    """served: every request's times. sent: bytes handed over. hits: share of prompt tokens found in a pool.
    leaked: blocks held at the end."""

    served: list[Served]
    sent: int
    hits: float
    leaked: int


@dataclass
class _Worker:
    engine: Engine
    executor: Nothing
    busy: bool = False
    heard: float = 0.0  # when its last report was there: none overtakes another
    free: float = 0.0  # when its last step was done


Then = Callable[[float], None]


@dataclass
class _Pace:
    """Steps of a kind. done: what their clock shows; ends: of each, on it."""

    done: float = 0.0
    ends: list[tuple[float, int, Then]] = field(default_factory=list)

    def left(self) -> float:
        return max(0.0, self.ends[0][0] - self.done) if self.ends else math.inf


@dataclass
class _Simulation:
    layout: Layout
    costs: Costs
    wires: Wires
    kv_bytes: int
    disturbance: Disturbance
    seed: int
    served: dict[int, Served] = field(default_factory=dict)
    heap: list[tuple[float, int, Then]] = field(default_factory=list)  # on the clock
    sent: int = 0

    def __post_init__(self) -> None:
        self.drawn = random.Random(self.seed)
        self.reading, self.writing = _Pace(), _Pace()
        self.workers = []
        for role in self.layout.roles:
            executor = Nothing(self.layout.block_size, self.kv_bytes)
            self.workers.append(_Worker(self.layout.engine(role, executor), executor))
        self.dispatcher = Dispatcher(self.layout.roles, limit=10**9)
        self.order = itertools.count()

    def at(self, when: float, what: Then) -> None:
        heapq.heappush(self.heap, (when, next(self.order), what))

    def compute(self, pace: _Pace, seconds: float, then: Then) -> None:
        """A step begins that takes a worker so many seconds when it is alone."""
        heapq.heappush(pace.ends, (pace.done + seconds, next(self.order), then))

    def run(self) -> None:
        now, paces = 0.0, (self.reading, self.writing)
        others = max(1, len(self.workers) - 1)
        while self.heap or self.reading.ends or self.writing.ends:
            reading, writing = (len(pace.ends) for pace in paces)
            slowness = (
                self.disturbance.slowness(True, max(0, reading - 1) / others, writing / others),
                self.disturbance.slowness(False, reading / others, max(0, writing - 1) / others),
            )
            first = self.heap[0][0] if self.heap else math.inf
            ends = [now + pace.left() * slower for pace, slower in zip(paces, slowness, strict=True)]
            when = min(first, *ends)
            for pace, slower in zip(paces, slowness, strict=True):
                pace.done += (when - now) / slower
            now = when
            heap = next((p.ends for p, end in zip(paces, ends, strict=True) if end == when), self.heap)
            heapq.heappop(heap)[2](now)

    def factor(self, kind: Sequence[float]) -> float:
        return self.drawn.choice(kind) if kind else 1.0

    def arrive(self, arrival: Arrival, now: float) -> None:
        index = self.dispatcher.submit(arrival.request)
        assert index is not None  # all workers are alive here
        worker = self.workers[index]
        rest = 0.0 if worker.busy else now - worker.free
        submit = self.wires.submit + self.wires.submit_rest * rested(rest)
        submit *= self.factor(self.disturbance.submit)
        self.at(now + submit, lambda then: self._into(worker, then, worker.engine.add, arrival.request))

    def _into(self, worker: _Worker, now: float, put: Callable[[Any, float], None], what: Any) -> None:
        put(what, now)
        if not worker.busy:
            self._start(worker, now)

    def _start(self, worker: _Worker, now: float) -> None:
        step = worker.engine.step()
        worker.busy = step is not None
        if step is None:
            return
        stored, worker.executor.stored = worker.executor.stored, []
        began = now + sum(self.wires.store + self.wires.store_byte * size for size in stored)
        seconds = self.costs.seconds(step.shape, now - worker.free)
        seconds *= self.factor(self.disturbance.kind(step.shape))
        pace = self.reading if step.shape.prompts else self.writing
        self.at(
            began, lambda then: self.compute(pace, seconds, lambda end: self._computed(worker, step, end))
        )

    def _computed(self, worker: _Worker, step: Step, now: float) -> None:
        handed = [event for event in step.events if isinstance(event, HandOver)]
        free = now + sum(self.wires.pack + self.wires.pack_byte * event.size_bytes for event in handed)
        worker.free = free
        drawn = self.disturbance.deliver_first if step.shape.prompts else self.disturbance.deliver
        deliver = self.wires.deliver * self.factor(drawn)
        worker.heard = delivered = max(worker.heard, free + deliver)
        for event in handed:
            self.at(delivered, self._sender(event))
        self.at(delivered, lambda then: self._delivered(step, then))
        self.at(
            free + self.wires.post * self.factor(self.disturbance.post),
            lambda then: self._start(worker, then),
        )

    def _delivered(self, step: Step, now: float) -> None:
        for event in step.events:
            if isinstance(event, Token) and self.dispatcher.token(event):
                self.served[event.number].at.append(now)
                self.served[event.number].tokens.append(event.token)

    def _sender(self, event: HandOver) -> Then:
        def send(now: float) -> None:
            index = self.dispatcher.hand_over(event)
            assert index is not None
            worker = self.workers[index]
            self.sent += event.size_bytes
            travel = self.wires.travel + self.wires.travel_byte * event.size_bytes
            travel *= self.factor(self.disturbance.travel)
            self.at(now + travel, lambda then: self._into(worker, then, worker.engine.receive, event))

        return send


def simulate(
    trace: Sequence[Arrival],
    layout: Layout,
    costs: Costs,
    wires: Wires,
    kv_bytes: int,
    disturbance: Disturbance = UNDISTURBED,
    seed: int = 0,
) -> Simulated:
    """Serves the whole trace. kv_bytes: keys and values of a token, for hand-overs. seed: of what is drawn
    from the disturbance."""
    run = _Simulation(layout, costs, wires, kv_bytes, disturbance, seed)
    for arrival in trace:
        run.served[arrival.request.number] = Served(arrival.request.number, arrival.at, arrival.at)

        def arrive(now: float, arrival: Arrival = arrival) -> None:
            run.arrive(arrival, now)

        run.at(arrival.at, arrive)
    run.run()
    engines = [worker.engine for worker in run.workers]
    return Simulated(
        list(run.served.values()),
        run.sent,
        sum(engine.hits for engine in engines) / max(1, sum(engine.looked_up for engine in engines)),
        sum(engine.pool.held for engine in engines),
    )
