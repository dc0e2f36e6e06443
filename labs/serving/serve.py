"""``perflab serve``: workers, service and endpoint in one place, until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from labs.lab import nearest
from labs.serving import collector
from labs.serving.config import WHOLE_PROMPTS, Config
from labs.serving.layout import Layout
from labs.serving.model import worker_bytes
from labs.serving.weights import HEAD
from labs.serving.worker import Model

API_KEY = "PERFLAB_API_KEY"
NAME = "perflab-gpt"
BACKLOG = 2048  # connections that wait to be taken
GRACE_S = 10.0  # for requests in the house, when it shuts down
LOOK_S = 0.05  # a signal is noticed after so long


@dataclass(frozen=True)
class Options:
    """What ``perflab serve`` was asked for. limit: requests in the house at once."""

    layout: Layout
    model: Model
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    limit: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(
                f"port={self.port} is no port; take one from 1 to 65535, or 0 for any that is free"
            )
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} requests: at least 1 must be served at a time")


def options_of(
    policy: str,
    counts: Mapping[str, int | None],
    settings: Mapping[str, str],
    host: str,
    port: int,
    api_key: str,
    limit: int,
) -> Options:
    """What the command line says. counts: workers, prefill, decode, budget and blocks, None where it does not
    say. settings: width, layers, context of the model. ValueError: what cannot be, what the policy does not
    use, and what this machine's memory has no room for."""
    model = dict(width=Config.width, layers=Config.layers, context=Config.context)
    for key, text in settings.items():
        if key not in model:
            raise ValueError(f"--set {key}: the model has no setting {key!r}{nearest(key, list(model))}")
        if not text.isdecimal() or not 1 <= int(text) <= 10**6:
            raise ValueError(f"--set {key}={text} must be a whole number of at least 1")
        model[key] = int(text)
    if model["width"] % HEAD:
        raise ValueError(f"--set width={model['width']} is no multiple of {HEAD}, the size of a head")
    apart = policy == "disaggregated"
    for name in ("workers",) if apart else ("prefill", "decode"):
        if counts.get(name) is not None:
            instead = "--prefill and --decode" if apart else "--workers"
            raise ValueError(f"--{name} says nothing under --policy {policy}; give {instead}")
    given = {name: value for name, value in counts.items() if value is not None}
    prefill, decode = given.get("prefill", 1), given.get("decode", 1)
    if apart and min(prefill, decode) < 1:
        raise ValueError(f"--prefill {prefill} --decode {decode}: each must be at least 1 worker")
    layout = Layout(
        policy,
        workers=prefill + decode if apart else given.get("workers", 2),
        prefill=prefill,
        budget=given.get("budget", Config.chunk if policy == "chunked" else WHOLE_PROMPTS),
        blocks=given.get("blocks", Config.blocks),
    )
    _check_memory(layout, **model)
    return Options(layout, Model(**model), host, port, api_key, limit)


def _check_memory(layout: Layout, width: int, layers: int, context: int) -> None:
    """ValueError where the workers' weights and caches are more than is free."""
    import psutil

    needed = layout.workers * worker_bytes(width, layers, layout.capacity)
    free = float(psutil.virtual_memory().available)
    if needed > free:
        raise ValueError(
            f"{layout.workers} workers with width={width}, layers={layers} and {layout.blocks} blocks need "
            f"about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError: the address is taken or is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        reason = "it is taken; choose another --port" if taken else error.strerror
        raise ValueError(f"cannot listen on {host} port {port}: {reason}") from None
    return listening


def serve(options: Options, now: Callable[[], float], wall: Callable[[], float]) -> int:
    """Serves until SIGINT or SIGTERM; what was accepted then has GRACE_S to finish, or until the signal comes
    again. Exit status 0, or 1 where a request could not be finished. now: the clock; wall: seconds since
    1970. ValueError: no worker starts."""
    from labs.concurrency import cluster
    from labs.unrecorded import Unrecorded

    listening = bound(options.host, options.port)  # before Ray takes its seconds
    try:
        cluster.cluster(options.layout.workers, Unrecorded(now))
        return asyncio.run(_serve(options, listening, now, wall))
    finally:
        listening.close()
        cluster.shut_down()


async def _serve(
    options: Options, listening: socket.socket, now: Callable[[], float], wall: Callable[[], float]
) -> int:
    import uvicorn

    from labs.serving.actors import Actor, LostWorker
    from labs.serving.endpoint import Endpoint
    from labs.serving.service import Closing, Service

    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end: they stop here
        signal.signal(number, lambda caught, frame: stopping.append(caught))
    service = Service(
        lambda: Actor(options.model, now), options.layout, now, options.limit, options.model.context
    )
    try:
        try:
            await _unless(stopping, service.ready())
        except (LostWorker, Closing, OSError) as error:
            raise ValueError(f"no worker of this model can be started: {error}") from None
        if stopping:
            return 0
        collector.settle()
        application = Endpoint(service, NAME, wall, options.api_key).application()
        config = uvicorn.Config(
            application,
            log_level="critical",  # how it ends is said by the exit status
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(GRACE_S) + 5,  # the service, which ends first, ends all answers
        )
        listening.listen(BACKLOG)  # who reads the line below can connect at once
        host, port = listening.getsockname()[:2]
        print(_welcome(options, host, port), flush=True)
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not (server.should_exit or serving.done()):
            await asyncio.sleep(LOOK_S)
        left = await service.close(GRACE_S, lambda: server.force_exit)
        await serving
        return 1 if left else 0
    finally:
        await service.close(0.0)


async def _unless(stopping: list[int], work: Coroutine[Any, Any, None]) -> None:
    """Waits for the work, but not after a signal."""
    task = asyncio.ensure_future(work)
    while not (task.done() or stopping):
        await asyncio.wait([task], timeout=LOOK_S)
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    elif not stopping:
        task.result()


def _welcome(options: Options, host: str, port: int) -> str:
    layout = options.layout
    shown = f"[{host}]" if ":" in host else host
    roles = (
        f"{layout.prefill} prefill and {layout.workers - layout.prefill} decode workers"
        if layout.disaggregated
        else f"{layout.workers} workers"
    )
    lines = [
        f"perflab serve: http://{shown}:{port}/v1/completions (model {NAME!r} with random weights, "
        f"{layout.policy}, {roles}, process {os.getpid()}); Ctrl-C ends it"
    ]
    if host not in ("127.0.0.1", "::1") and not options.api_key:
        lines.append(f"perflab serve: anyone who reaches {host} can use it; set {API_KEY} to ask for a key")
    return "\n".join(lines)
