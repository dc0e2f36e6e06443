"""Who serves which request: to the least loaded worker, again elsewhere when a worker is lost, and not at all
when there are too many. Without clocks, processes or network: the service and the simulator use this same
code.

Load is counted in tokens that are still to be computed; one that is written costs a whole step, as many that
are read cost together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from labs.serving.layout import Role
from labs.serving.request import HandOver, Request, Token

WRITING_WEIGHT = 8
"""Tokens read that take as long as one written."""


class Overloaded(Exception):
    """There are as many requests as may be in the house; nothing was accepted."""


@dataclass
class Assigned:
    """A request in the house: on which worker (None: on its way), what it has written. attempts: how often a
    worker was given its prompt to read."""

    request: Request
    worker: int | None
    written: list[int] = field(default_factory=list)
    attempts: int = 0

    @property
    def load(self) -> int:
        unread = 0 if self.written else len(self.request.prompt)
        return unread + WRITING_WEIGHT * (self.request.output - len(self.written))


class Dispatcher:
    """roles: of each worker. limit: requests in the house at once."""

    def __init__(self, roles: Sequence[Role], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit} requests: at least 1 must be served at a time")
        self.roles, self.limit = list(roles), limit
        self.alive = [True] * len(roles)
        self.only: int | None = None  # the one worker that is given requests, where not all are
        self.requests: dict[int, Assigned] = {}
        self._assigned: list[dict[int, Assigned]] = [{} for _ in roles]

    def submit(self, request: Request) -> int | None:
        """The worker for a new request. Overloaded: nothing is accepted. None: no worker that could read it
        is alive now; it is accepted, and ``stranded`` until one is."""
        if len(self.requests) >= self.limit:
            raise Overloaded(f"{self.limit} requests are being served already; try again later")
        self.requests[request.number] = Assigned(request, None)
        return self._read(request.number)

    def token(self, token: Token) -> bool:
        """Notes a token; False where nobody waits for it (aborted, or written before its worker was lost)."""
        assigned = self.requests.get(token.number)
        if assigned is None or token.place != len(assigned.written):
            return False
        assigned.written.append(token.token)
        if token.finished:
            self.forget(token.number)
        return True

    def hand_over(self, event: HandOver) -> int | None:
        """The worker that goes on with it; None: nobody waits for it, or nobody alive could."""
        if event.request.number not in self.requests:
            return None
        return self._assign(event.request.number, ("decode",))

    def forget(self, number: int) -> int | None:
        """The request is done or given up; the worker it was on."""
        assigned = self.requests.pop(number, None)
        if assigned is None or assigned.worker is None:
            return None
        self._assigned[assigned.worker].pop(number, None)
        return assigned.worker

    def lost(self, worker: int) -> list[int]:
        """The worker is gone; the requests that were on it, now stranded."""
        self.alive[worker] = False
        numbers = list(self._assigned[worker])
        for number in numbers:
            self.requests[number].worker = None
        self._assigned[worker].clear()
        return numbers

    def restored(self, worker: int) -> None:
        self.alive[worker] = True

    def retry(self, number: int) -> tuple[int | None, Request]:
        """(worker, what is left of it) for a request whose worker was lost: what it has written is read
        again."""
        assigned = self.requests[number]
        return self._read(number), assigned.request.after(assigned.written)

    def _read(self, number: int) -> int | None:
        worker = self._assign(number, ("both", "prefill"))
        self.requests[number].attempts += worker is not None
        return worker

    def _assign(self, number: int, roles: Sequence[Role]) -> int | None:
        assigned = self.requests[number]
        if assigned.worker is not None:
            self._assigned[assigned.worker].pop(number, None)
        able = [
            index
            for index, role in enumerate(self.roles)
            if role in roles and self.alive[index] and self.only in (None, index)
        ]
        assigned.worker = min(able, key=self._load) if able else None
        if assigned.worker is not None:
            self._assigned[assigned.worker][number] = assigned
        return assigned.worker

    def _load(self, worker: int) -> int:
        return sum(each.load for each in self._assigned[worker].values())
