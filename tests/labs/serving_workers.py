"""Workers in threads of this process, and a service and an endpoint over them."""

import asyncio
import contextlib
import gc
import queue
import threading
import time

import uvicorn

from labs.serving.actors import LostWorker
from labs.serving.endpoint import Endpoint
from labs.serving.layout import Layout
from labs.serving.service import Service
from labs.serving.worker import Model, Stop, Worker

MODEL = Model(width=64, layers=2, context=256)


class Witness:
    """Something that was there before; the collector looks at it until it has been told that it stays."""

    def __init__(self):
        self.there = []

    @property
    def looked_at(self):
        return any(each is self.there for each in gc.get_objects())  # what is frozen is not among them


class ThreadWorker:
    """A worker whose engine is a thread of this process; ``kill`` ends it as the end of a process would."""

    def __init__(self) -> None:
        self.reports, self.dead = queue.SimpleQueue(), False
        self.worker = Worker(MODEL, time.perf_counter, self.report)

    def report(self, report):
        self.reports.put(report)

    async def _call(self, function, *arguments):
        if self.dead:
            raise LostWorker("killed")
        found = await asyncio.to_thread(function, *arguments)
        if self.dead:
            raise LostWorker("killed")
        return found

    async def put(self, messages):
        await self._call(self.worker.put, messages)

    async def poll(self):
        return await self._call(self._reports)

    def _reports(self):
        try:
            found = [self.reports.get(timeout=0.05)]
        except queue.Empty:
            return []
        while not self.reports.empty():
            found.append(self.reports.get())
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found

    def pick(self, kept):
        return kept

    async def process(self):
        return 0

    async def held(self):
        return await self._call(self.worker.held)

    async def end(self):
        self.kill()

    def lose(self, reason):
        self.kill()

    def kill(self):
        self.dead = True
        self.worker.put([Stop()])


class SlowWorker(ThreadWorker):
    """A step takes 3 ms more: a request is there for as long as it takes to do something to it."""

    def report(self, report):
        super().report(report)
        time.sleep(3e-3)


def layout(policy: str = "chunked", **settings) -> Layout:
    return Layout(policy, **{**dict(blocks=64, block_size=4, budget=32), **settings})


@contextlib.asynccontextmanager
async def service_of(layout: Layout, limit: int = 256, start=ThreadWorker):
    service = Service(start, layout, time.perf_counter, limit, MODEL.context)
    try:
        await service.ready()
        yield service
    finally:
        await service.close(0.0)


class Served:
    """An endpoint on a port of 127.0.0.1, in a thread of its own."""

    def __init__(self, layout: Layout, limit: int = 256, api_key: str = "", start=ThreadWorker) -> None:
        self._settings = layout, limit, api_key, start
        self.service = self.port = self.failure = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._up.wait(60), "waited 60 s for the endpoint to come up"
        if self.failure:
            raise self.failure
        self.url = f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        layout, limit, api_key, start = self._settings
        try:
            async with service_of(layout, limit, start) as self.service:
                application = Endpoint(self.service, "model", time.time, api_key).application()
                config = uvicorn.Config(
                    application,
                    port=0,
                    log_level="error",
                    lifespan="off",
                    timeout_graceful_shutdown=2,
                    backlog=2048,
                )
                self.server = uvicorn.Server(config)
                serving = asyncio.ensure_future(self.server.serve())
                while not self.server.started:
                    await asyncio.sleep(0.01)
                self.port = self.server.servers[0].sockets[0].getsockname()[1]
                self.loop = asyncio.get_running_loop()
                self._up.set()
                await serving
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._up.set()

    def wait_until_empty(self, wait_s: float = 30.0) -> None:
        """No request is in the house, and no worker holds a block."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            engines = [each.worker._engine for each in self.service.workers]
            if not self.service.dispatcher.requests and not any(engine.pool.held for engine in engines):
                return
            time.sleep(0.02)
        raise AssertionError(f"after {wait_s} s: {self.service.dispatcher.requests}")

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "waited 30 s for the endpoint to end"
