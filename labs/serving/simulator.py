"""The engine and the dispatcher on a virtual clock: what would be measured, from the costs of a step.

Nothing of the engine is modelled: it is the code that serves, with an executor that computes nothing. What is
modelled is how long a step takes (``labs.serving.costs``) and how long messages travel.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from labs.serving.costs import Costs, Wires
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


@dataclass
class _Simulation:
    layout: Layout
    costs: Costs
    wires: Wires
    kv_bytes: int
    served: dict[int, Served] = field(default_factory=dict)
    heap: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    sent: int = 0

    def __post_init__(self) -> None:
        self.workers = []
        for role in self.layout.roles:
            executor = Nothing(self.layout.block_size, self.kv_bytes)
            self.workers.append(_Worker(self.layout.engine(role, executor), executor))
        self.dispatcher = Dispatcher(self.layout.roles, limit=10**9)
        self.order = itertools.count()

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.heap, (when, next(self.order), what))

    def arrive(self, arrival: Arrival, now: float) -> None:
        index = self.dispatcher.submit(arrival.request)
        assert index is not None  # all workers are alive here
        worker = self.workers[index]
        self.at(
            now + self.wires.submit, lambda then: self._into(worker, then, worker.engine.add, arrival.request)
        )

    def _into(self, worker: _Worker, now: float, put: Callable[[Any, float], None], what: Any) -> None:
        put(what, now)
        self._start(worker, now)

    def _start(self, worker: _Worker, now: float) -> None:
        if worker.busy:
            return
        step = worker.engine.step()
        if step is None:
            return
        worker.busy = True
        stored, worker.executor.stored = worker.executor.stored, []
        began = now + sum(self.wires.store + self.wires.store_byte * size for size in stored)
        end = began + self.costs.seconds(step.shape)
        free = end
        for event in step.events:
            if isinstance(event, HandOver):
                free += self.wires.pack + self.wires.pack_byte * event.size_bytes
                self.at(free + self.wires.deliver, self._sender(event))
        self.at(free, lambda then: self._ended(worker, then))
        self.at(free + self.wires.deliver, lambda then: self._delivered(step, then))

    def _ended(self, worker: _Worker, now: float) -> None:
        worker.busy = False
        self._start(worker, now)

    def _delivered(self, step: Step, now: float) -> None:
        for event in step.events:
            if isinstance(event, Token) and self.dispatcher.token(event):
                self.served[event.number].at.append(now)
                self.served[event.number].tokens.append(event.token)

    def _sender(self, event: HandOver) -> Callable[[float], None]:
        def send(now: float) -> None:
            index = self.dispatcher.hand_over(event)
            assert index is not None
            worker = self.workers[index]
            self.sent += event.size_bytes
            arrives = now + self.wires.travel + self.wires.travel_byte * event.size_bytes
            self.at(arrives, lambda then: self._into(worker, then, worker.engine.receive, event))

        return send


def simulate(
    trace: Sequence[Arrival], layout: Layout, costs: Costs, wires: Wires, kv_bytes: int
) -> Simulated:
    """Serves the whole trace. kv_bytes: keys and values of a token, for hand-overs."""
    run = _Simulation(layout, costs, wires, kv_bytes)
    for arrival in trace:
        run.served[arrival.request.number] = Served(arrival.request.number, arrival.at, arrival.at)

        def arrive(now: float, arrival: Arrival = arrival) -> None:
            run.arrive(arrival, now)

        run.at(arrival.at, arrive)
    while run.heap:
        now, _, what = heapq.heappop(run.heap)
        what(now)
    engines = [worker.engine for worker in run.workers]
    return Simulated(
        list(run.served.values()),
        run.sent,
        sum(engine.hits for engine in engines) / max(1, sum(engine.looked_up for engine in engines)),
        sum(engine.pool.held for engine in engines),
    )
