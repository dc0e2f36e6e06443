"""Messages to one worker: in order, and those that wait together in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from labs.serving.actors import LostHandOver
from labs.serving.worker import Message, Receive, Report


class Held(Protocol):
    """A worker as the service holds it (``labs.serving.actors.Actor``)."""

    async def put(self, messages: Sequence[Message]) -> None: ...
    async def poll(self) -> list[Report]: ...
    async def process(self) -> int: ...
    async def held(self) -> int: ...
    def lose(self, reason: str) -> None: ...
    def pick(self, kept: Any) -> Any: ...
    async def end(self) -> None: ...


class Mailbox:
    """Delivers in a task of its own. again: gets the number of a request whose keys and values were lost on
    the way. A worker that does not take what is posted is given up: what is lost with these messages is known
    to nobody else, and whoever listens to the worker hears of it and serves them elsewhere."""

    def __init__(self, worker: Held, again: Callable[[int], None]) -> None:
        self.worker, self._again = worker, again
        self._waiting: list[Message] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def empty(self) -> bool:
        return self._task is None

    def post(self, message: Message) -> None:
        self._waiting.append(message)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._deliver())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _deliver(self) -> None:
        try:
            while self._waiting:
                messages, self._waiting = self._waiting, []
                try:
                    await self.worker.put(messages)
                except LostHandOver:
                    await self._one_by_one(messages)
        except Exception as error:
            self._waiting.clear()
            self.worker.lose(f"it has not taken its messages ({type(error).__name__}: {error})")
        finally:
            self._task = None

    async def _one_by_one(self, messages: Sequence[Message]) -> None:
        """A hand-over among these cannot be fetched: its request is read again. None has been taken so
        far."""
        for message in messages:
            try:
                await self.worker.put([message])
            except LostHandOver:
                assert isinstance(message, Receive)
                self._again(message.hand_over.request.number)
