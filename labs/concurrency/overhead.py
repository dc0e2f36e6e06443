"""What it costs to start workers and to hand a task over, with tasks that do nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from labs.concurrency import cluster, pools, workers
from labs.concurrency.config import Config
from labs.lab import Recorder, Step, Variant

METHODS = ("threads", "fork", "forkserver", "spawn")


def _start(method: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        if method == "threads":  # needs no clean process
            return lambda: pools.start_and_stop(method, config.pool)
        launcher = pools.Launcher()
        return pools.Step(lambda: launcher.start_and_stop(method, config.pool), launcher.close)

    return setup


def _serial(config: Config, recorder: Recorder) -> Step:
    return lambda: [workers.nothing(item) for item in range(config.tiny_tasks)]


def _threads(config: Config, recorder: Recorder) -> Step:
    pool, each = pools.thread_pool(config.pool), range(config.tiny_tasks)
    return pools.Step(lambda: pool.map(workers.nothing, each, 1), pool.close)


def _processes(chunked: bool) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        pool, each = pools.process_pool(config.pool), range(config.tiny_tasks)
        chunk = config.chunk if chunked else 1
        return pools.Step(lambda: pool.map(workers.nothing, each, chunk), pool.close)

    return setup


async def _nothing(item: int) -> int:
    return workers.nothing(item)


def _asyncio(config: Config, recorder: Recorder) -> Step:
    runner = asyncio.Runner()

    async def together() -> list[int]:
        return list(await asyncio.gather(*(_nothing(item) for item in range(config.tiny_tasks))))

    return pools.Step(lambda: runner.run(together()), runner.close)


def _ray(config: Config, recorder: Recorder) -> Step:
    ray = cluster.cluster(config.pool, recorder)

    def step() -> object:
        recorder.record("start_s", ray.start_s, "s")
        return ray.run(workers.nothing, [(item,) for item in range(config.tiny_tasks)])

    return step


def variants(config: Config) -> Sequence[Variant]:
    """start_up and per_task. Ray's start is recorded by its variants (``start_s``): it happens once."""
    start = [
        Variant("start_up", method, _start(method), threads=0, unavailable=_missing(method))
        for method in METHODS
    ]
    return [
        *start,
        Variant("per_task", "serial", _serial),
        Variant("per_task", "asyncio", _asyncio),
        Variant("per_task", "threads", _threads, threads=0),
        Variant("per_task", "processes", _processes(chunked=False), threads=0),
        Variant("per_task", "processes_chunked", _processes(chunked=True), threads=0),
        Variant("per_task", "ray", _ray, threads=0, max_rounds=5, unavailable=cluster.unavailable()),
    ]


def _missing(method: str) -> str:
    from multiprocessing import get_all_start_methods

    if method == "threads" or method in get_all_start_methods():
        return ""
    return f"this system cannot start processes by {method}"
