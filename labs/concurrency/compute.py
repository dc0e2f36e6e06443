"""The same tasks through each way to run them: work that holds the GIL, work that releases it, waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from labs.concurrency import cluster, pools, workers
from labs.concurrency.config import Config
from labs.lab import Recorder, Step, Variant

Task = Callable[..., float]
Build = Callable[[Any, Recorder], Step]
MANY_THREADS = 100  # of many_waits: a usual size for a server's pool
FLOPS = 3.0  # of one iteration of the logistic map


def _compiled(config: Config) -> Task:
    from labs.concurrency.numba_work import compiled_work

    return compiled_work


def _compiled_with_gil(config: Config) -> Task:
    from labs.concurrency.numba_work import compiled_work_with_gil

    return compiled_work_with_gil


def _python(config: Config) -> Task:
    return workers.python_work


def _numpy(config: Config) -> Task:
    return workers.numpy_work


def _wait(config: Config) -> Task:
    return workers.wait


def arguments(config: Config, group: str) -> list[tuple[Any, ...]]:
    """One tuple of arguments a task."""
    match group:
        case "python_work":
            return [(config.iterations,)] * config.tasks
        case "numpy_work":
            return [(config.numpy_iterations, config.elements)] * config.tasks
        case "numba_work":
            return [(config.numba_iterations,)] * config.tasks
        case "waiting":
            return [(config.wait_s,)] * config.waits
        case "many_waits":
            return [(config.wait_s,)] * config.many_waits
    raise ValueError(f"no tasks are defined for a group {group!r}")


def _serial(group: str, task: Callable[[Config], Task]) -> Build:
    def setup(config: Config, recorder: Recorder) -> Step:
        function, each = task(config), arguments(config, group)
        return lambda: [function(*values) for values in each]

    return setup


def _threads(group: str, task: Callable[[Config], Task], count: int = 0) -> Build:
    def setup(config: Config, recorder: Recorder) -> Step:
        wanted = count or (config.waits if group == "waiting" else config.pool)
        function, each, pool = task(config), arguments(config, group), pools.thread_pool(wanted)
        return pools.Step(lambda: pool.run(function, each), pool.close)

    return setup


def _processes(group: str, task: Callable[[Config], Task]) -> Build:
    def setup(config: Config, recorder: Recorder) -> Step:
        function, each, pool = task(config), arguments(config, group), pools.process_pool(config.pool)
        return pools.Step(lambda: pool.run(function, each), pool.close)

    return setup


def _ray(group: str, task: Callable[[Config], Task]) -> Build:
    def setup(config: Config, recorder: Recorder) -> Step:
        function, each = task(config), arguments(config, group)
        ray = cluster.cluster(config.pool, recorder)

        def step() -> object:
            recorder.record("start_s", ray.start_s, "s")
            return ray.run(function, each)

        return step

    return setup


async def _pause(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


def _asyncio(group: str) -> Build:
    def setup(config: Config, recorder: Recorder) -> Step:
        each = arguments(config, group)
        runner = asyncio.Runner()

        async def together() -> list[float]:
            async with asyncio.timeout(pools.PATIENCE_S):
                return list(await asyncio.gather(*(_pause(*values) for values in each)))

        return pools.Step(lambda: runner.run(together()), runner.close)

    return setup


def variants(config: Config) -> Sequence[Variant]:
    """python_work, numpy_work, numba_work, waiting and many_waits."""
    no_ray = cluster.unavailable()
    found: list[Variant] = []

    def add(
        group: str, name: str, setup: Build, flops: float = 0.0, together: bool = False, no: str = ""
    ) -> None:
        threads = 0 if together else 1
        found.append(
            Variant(group, name, setup, flops=flops, dtype="float64", threads=threads, unavailable=no)
        )

    flops = FLOPS * config.tasks * config.iterations
    add("python_work", "serial", _serial("python_work", _python), flops)
    add("python_work", "threads", _threads("python_work", _python), flops, True)
    add("python_work", "processes", _processes("python_work", _python), flops, True)
    add("python_work", "ray", _ray("python_work", _python), flops, True, no_ray)

    flops = FLOPS * config.tasks * config.numpy_iterations * config.elements
    add("numpy_work", "serial", _serial("numpy_work", _numpy), flops)
    add("numpy_work", "threads", _threads("numpy_work", _numpy), flops, True)
    add("numpy_work", "processes", _processes("numpy_work", _numpy), flops, True)

    flops = FLOPS * config.tasks * config.numba_iterations
    add("numba_work", "serial", _serial("numba_work", _compiled), flops)
    add("numba_work", "threads_holding_gil", _threads("numba_work", _compiled_with_gil), flops, True)
    add("numba_work", "threads_nogil", _threads("numba_work", _compiled), flops, True)

    # Besides being a way to run it, this is the control: two processes share no lock, so where they are no
    # faster either, the cores were not free (labs/concurrency/claims.py).
    add("numba_work", "processes", _processes("numba_work", _compiled), flops, True)

    add("waiting", "serial", _serial("waiting", _wait))
    add("waiting", "processes", _processes("waiting", _wait))
    add("waiting", "threads", _threads("waiting", _wait))
    add("waiting", "asyncio", _asyncio("waiting"))
    add("waiting", "ray", _ray("waiting", _wait), no=no_ray)

    add("many_waits", "threads_100", _threads("many_waits", _wait, MANY_THREADS))
    add("many_waits", "asyncio", _asyncio("many_waits"))
    return found


def reference(config: Config, group: str) -> list[float]:
    """What each task must return, computed here and now, one after the other."""
    first = arguments(config, group)[0]
    if group in ("waiting", "many_waits"):
        value = float(first[0])
    elif group == "numpy_work":
        value = workers.python_work(first[0])  # each element does what a Python loop does
    else:
        value = workers.python_work(config.iterations) if group == "python_work" else _long(config)
    return [value] * len(arguments(config, group))


def _long(config: Config) -> float:
    from labs.concurrency.numba_work import compiled_work

    # Held against Python where that takes milliseconds; the long run then against another entry point.
    if compiled_work(1000) != workers.python_work(1000):
        return float("nan")
    from labs.concurrency.numba_work import compiled_work_with_gil

    return compiled_work_with_gil(config.numba_iterations)
