"""Workers as Ray actors; keys and values travel through Ray's object store.

Requests come in and tokens go out, a report a step, over a socket of the worker's own: an actor call takes
about a millisecond of two processes, and a step that writes takes but a few. What is handed over stays with
its worker until the next one asks for it, in an actor call: Ray brings it from store to store, and no engine
waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from labs.serving.worker import Failed, Message, Model, Receive, Report, Worker

START_S, CALL_S = 120.0, 60.0
"""For a start with its model, and for any other answer. A worker that is silent for the second is asked
whether it is still there."""
THREADS = 4  # of an actor, beside its engine's
SECRET_BYTES = 32
_SIZE = struct.Struct("!I")


class LostWorker(Exception):
    """The worker's process is gone, or does not answer."""


class LostHandOver(Exception):
    """Keys and values were lost with the worker that had sent them."""


class WorkerActor:
    """What runs in the actor's process. address, secret: where its reports go and messages come from, and
    what is said there first."""

    def __init__(
        self, model: Model, now: Callable[[], float], address: tuple[str, int], secret: bytes
    ) -> None:
        import ray
        import torch  # noqa: F401 (before any thread: two that import NumPy at a time find half of it)

        import kernels  # noqa: F401

        self._kept: dict[int, Any] = {}
        self._keys = itertools.count()
        self._socket = socket.create_connection(address, START_S)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(secret)
        self.worker = Worker(
            model, now, self._send, self._keep, fetch=lambda sent: ray.get(sent[0], timeout=CALL_S)
        )
        self._received, self._more = 0, threading.Condition()
        threading.Thread(target=self._receive, daemon=True, name="messages").start()

    def put(self, messages: Sequence[Message]) -> None:
        self.worker.put(messages)

    def payload(self, key: int) -> Any:
        """What was kept, once: Ray puts it into its store for whoever has the reference."""
        return self._kept.pop(key)

    def process(self) -> int:
        return os.getpid()

    def held(self, sent: int) -> int:
        """Blocks in use, once ``sent`` messages have come over the socket."""
        with self._more:
            self._more.wait_for(lambda: self._received >= sent, CALL_S)
        return self.worker.held()

    def _receive(self) -> None:
        """Until the connection ends. What cannot be read ends it: whoever listens hears of that."""
        stream = self._socket.makefile("rb")
        try:
            while len(head := stream.read(_SIZE.size)) == _SIZE.size:
                self.worker.put(pickle.loads(stream.read(_SIZE.unpack(head)[0])))
                with self._more:
                    self._received += 1
                    self._more.notify_all()
        finally:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _keep(self, payload: Any) -> int:
        key = next(self._keys)
        self._kept[key] = payload
        return key

    def _send(self, report: Report | Failed) -> None:
        self._socket.sendall(_framed(report))


def _framed(content: Any) -> bytes:
    pickled = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(pickled)) + pickled


class Actor:
    """A worker as the service holds it, on the service's event loop. LostWorker once its process is gone."""

    def __init__(self, model: Model, now: Callable[[], float]) -> None:
        import ray

        self._listening = socket.create_server(("127.0.0.1", 0))
        self._secret = os.urandom(SECRET_BYTES)
        remote = ray.remote(num_cpus=0, max_concurrency=THREADS, max_restarts=0)(WorkerActor)
        self.handle = remote.remote(model, now, self._listening.getsockname(), self._secret)
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._up = asyncio.Event()  # ``_writer`` is there
        self._sent = 0  # messages over the socket
        self._ended = asyncio.Event()  # nothing more is read
        self._process: psutil.Process | None = None
        self._reports: asyncio.Queue[Report | Failed | LostWorker] = asyncio.Queue()

    async def process(self) -> int:
        """The number of its process, once it is there and its reports can come."""
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, sock=self._listening)
        number = await self._answer(self.handle.process.remote(), START_S)
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(number)
        return number

    async def put(self, messages: Sequence[Message]) -> None:
        """Hand-overs in an actor call, with which Ray brings what they refer to; they have been taken when it
        returns. All else over the socket."""
        if any(isinstance(each, Receive) for each in messages):
            await self._answer(self.handle.put.remote(list(messages)), CALL_S)
            return
        framed = _framed(list(messages))
        try:
            async with asyncio.timeout(CALL_S):
                await self._up.wait()
                assert self._writer is not None
                if self._ended.is_set():
                    raise ConnectionResetError
                self._writer.write(framed)
                self._sent += 1
                await self._writer.drain()
        except TimeoutError:
            raise LostWorker(f"it has not taken its messages for {CALL_S:g} s") from None
        except ConnectionError:
            raise LostWorker("its connection has ended") from None

    async def poll(self) -> list[Report]:
        """All reports that have come, waiting for the first; none after a silence in which it was there.
        Raises Failed where its engine did, LostWorker where it is gone or stopped."""
        try:
            async with asyncio.timeout(CALL_S):
                found = [await self._reports.get()]
        except TimeoutError:
            await self._answer(self.handle.process.remote(), CALL_S)
            return []
        while not self._reports.empty():
            found.append(self._reports.get_nowait())
        for each in found:
            if isinstance(each, Exception):
                raise each
        return [each for each in found if isinstance(each, Report)]

    def lose(self, reason: str) -> None:
        """Ends the process, and ``poll`` raises LostWorker."""
        import ray

        ray.kill(self.handle, no_restart=True)
        self._reports.put_nowait(LostWorker(reason))

    def pick(self, kept: Any) -> Any:
        """A reference to what was kept; in a list it travels as one, and the data never comes here."""
        return [self.handle.payload.remote(kept)]

    async def held(self) -> int:
        """Blocks in use."""
        return await self._answer(self.handle.held.remote(self._sent), CALL_S)

    async def end(self) -> None:
        """Ends the process; it has nothing to say any more."""
        import ray

        ray.kill(self.handle, no_restart=True)
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                self._process.resume()  # Ray asks it to end, and one that is stopped does not hear
        if self._writer is not None:
            self._writer.close()
            await asyncio.wait_for(self._ended.wait(), CALL_S)
        if self._server is not None:
            self._server.close()
        self._listening.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads reports until the process ends. Whoever does not know the secret is not heard."""
        reason = "its process has ended"
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, TimeoutError):
                said = await asyncio.wait_for(reader.readexactly(SECRET_BYTES), CALL_S)
                if not hmac.compare_digest(said, self._secret):
                    return
                self._writer = writer
                self._up.set()
                while True:
                    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
                    self._reports.put_nowait(pickle.loads(await reader.readexactly(size)))
        except Exception as error:  # whatever a report is that cannot be read, more will not be
            reason = f"its reports cannot be read ({type(error).__name__}: {error})"
        finally:
            writer.close()
            if self._writer is writer:
                self._reports.put_nowait(LostWorker(reason))
                self._ended.set()

    async def _answer(self, reference: Any, wait_s: float) -> Any:
        import ray

        try:
            return await asyncio.wait_for(_awaited(reference), wait_s)
        except ray.exceptions.RayActorError as error:
            raise LostWorker(f"its process has ended ({type(error).__name__})") from None
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ray.exceptions.RayError):  # its sender is gone, and with it what it kept
                raise LostHandOver(str(type(cause).__name__)) from None
            raise
        except TimeoutError:
            raise LostWorker(f"it has not answered for {wait_s:g} s") from None


async def _awaited(reference: Any) -> Any:
    return await reference
