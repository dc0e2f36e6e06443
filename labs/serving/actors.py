"""Workers as Ray actors; keys and values travel through Ray's object store.

An actor has threads for its mailbox beside the engine's own, so that a call never waits for a step. Which
process has a worker is Ray's business: on a cluster they may stand on other machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from labs.serving.worker import Message, Model, Report, Worker

START_S, CALL_S = 120.0, 60.0
THREADS = 4  # of an actor: one polls, one receives, others look


class LostWorker(Exception):
    """The worker's process is gone, or does not answer."""


class WorkerActor:
    """What runs in the actor's process."""

    def __init__(self, model: Model, now: Callable[[], float]) -> None:
        import ray

        # A reference in a list travels as a reference: the driver passes it on and never holds the data.
        self.worker = Worker(
            model,
            now,
            share=lambda payload: [ray.put(payload)],
            fetch=lambda sent: ray.get(sent[0], timeout=CALL_S),
        )

    def put(self, messages: Sequence[Message]) -> None:
        self.worker.put(messages)

    def poll(self) -> list[Report]:
        return self.worker.poll()

    def process(self) -> int:
        import os

        return os.getpid()

    def held(self) -> int:
        return self.worker.held()


class Actor:
    """A worker as the service holds it. LostWorker from every call, once its process is gone."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def put(self, messages: Sequence[Message]) -> None:
        await self._answer(self.handle.put.remote(list(messages)))

    async def poll(self) -> list[Report]:
        return await self._answer(self.handle.poll.remote())

    async def process(self) -> int:
        return await self._answer(self.handle.process.remote(), START_S)

    async def held(self) -> int:
        """Blocks in use."""
        return await self._answer(self.handle.held.remote())

    async def end(self) -> None:
        """Ends the process; it has nothing to say any more."""
        import ray

        ray.kill(self.handle, no_restart=True)

    async def _answer(self, reference: Any, wait_s: float = CALL_S) -> Any:
        import ray

        try:
            return await asyncio.wait_for(_awaited(reference), wait_s)
        except ray.exceptions.RayActorError as error:
            raise LostWorker(f"its process has ended ({type(error).__name__})") from None
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ray.exceptions.RayError):  # its sender is gone, and with it what it sent
                raise LostHandOver(str(type(cause).__name__)) from None
            raise
        except TimeoutError:
            raise LostWorker(f"it has not answered for {wait_s:g} s") from None


class LostHandOver(Exception):
    """Keys and values were lost with the worker that had sent them."""


async def _awaited(reference: Any) -> Any:
    return await reference


def start_actor(model: Model, now: Callable[[], float]) -> Actor:
    """A new worker in the running Ray cluster; it starts in the background."""
    import ray

    remote = ray.remote(num_cpus=0, max_concurrency=THREADS, max_restarts=0)(WorkerActor)
    return Actor(remote.remote(model, now))
