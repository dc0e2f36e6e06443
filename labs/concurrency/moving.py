"""Bytes to a worker and back, and arrays of several workers added up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from labs.concurrency import cluster, pools, workers
from labs.concurrency.config import Config
from labs.lab import Recorder, Step, Variant

if TYPE_CHECKING:
    import numpy as np

SAMPLE = 1021  # of an array that stays where it is, every so many items are shown as proof


def payload(config: Config, seed: int = 0) -> np.ndarray:
    """Random float32, ``config.payload_MiB`` of it; zeros would travel and add too cheaply."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal(config.payload_elements, dtype=np.float32)


def echo_arrays(config: Config, size: int) -> list[np.ndarray]:
    """One float64 array of ``size`` bytes for each worker, its items inside the logistic map's range."""
    import numpy as np

    generator = np.random.default_rng(size)
    return [generator.uniform(0.1, 0.9, size // 8) for _ in range(config.pool)]


def _serial(config: Config, recorder: Recorder) -> Step:
    array = payload(config)
    return lambda: workers.negated(array)


def _thread(config: Config, recorder: Recorder) -> Step:
    array, pool = payload(config), pools.thread_pool(config.pool)
    return pools.Step(lambda: pool.run(workers.negated, [(array,)])[0], pool.close)


def _pickled(config: Config, recorder: Recorder) -> Step:
    array, pool = payload(config), pools.process_pool(config.pool)
    return pools.Step(lambda: pool.run(workers.negated, [(array,)])[0], pool.close)


def _shared_memory(config: Config, recorder: Recorder) -> Step:
    """Copied into a segment both have mapped, worked on in place, copied out."""
    array, pool = payload(config), pools.process_pool(config.pool)
    shared = pools.SharedArray(array.size)

    def step() -> object:
        shared.array[:] = array
        pool.run(workers.negate_shared, [(shared.name, array.size)])
        return shared.array.copy()

    return pools.Step(step, pool.close, shared.close)


def _resident(config: Config, recorder: Recorder) -> Step:
    """The array lives in the segment; the worker turns its sign there and back, so nothing is copied."""
    array, pool = payload(config), pools.process_pool(config.pool)
    shared = pools.SharedArray(array.size)
    shared.array[:] = array
    sign = [1.0]

    def step() -> object:
        pool.run(workers.negate_shared, [(shared.name, array.size)])
        sign[0] = -sign[0]
        return -sign[0] * shared.array[::SAMPLE]  # a copy of it all would be what this variant avoids

    return pools.Step(step, pool.close, shared.close)


def _ray(config: Config, recorder: Recorder) -> Step:
    array, ray = payload(config), cluster.cluster(config.pool, recorder)

    def step() -> object:
        import ray as library

        # A task's argument is a read-only view of the object store: one copy in, one of the result.
        return ray.run(workers.negated, [(library.put(array),)])[0]

    return step


# --- combining what several workers hold ---------------------------------------------------------


def _combine_threads(config: Config, recorder: Recorder) -> Step:
    """Each of as many threads adds all arrays over its share of the elements: memory is shared anyway."""
    import numpy as np

    count = config.ranks
    arrays = [payload(config, seed) for seed in range(count)]
    total, pool = np.empty_like(arrays[0]), pools.thread_pool(count)
    cuts = [total.size * part // count for part in range(count + 1)]

    def add(begin: int, end: int) -> None:
        np.add(arrays[0][begin:end], arrays[1][begin:end], out=total[begin:end])
        for array in arrays[2:]:
            total[begin:end] += array[begin:end]

    def step() -> object:
        pool.run(add, list(itertools.pairwise(cuts)))
        return total

    return pools.Step(step, pool.close)


def _combine_gloo(config: Config, recorder: Recorder) -> Step:
    """Each rank of the world holds one array; all_reduce leaves the sum in all."""
    import torch
    import torch.distributed as distributed

    mine = torch.from_numpy(payload(config, distributed.get_rank()))
    total = torch.empty_like(mine)

    def step() -> object:
        total.copy_(mine)
        distributed.all_reduce(total)
        return total.numpy()

    return step


def variants(config: Config) -> Sequence[Variant]:
    """transfer and combine."""
    size = 4.0 * config.payload_elements
    found: list[Variant] = []

    def add(group: str, name: str, setup: Callable[[Any, Recorder], Step], moved: float, **more: Any) -> None:
        found.append(Variant(group, name, setup, bytes_moved=moved, working_set=2 * size, **more))

    add("transfer", "serial", _serial, 2 * size)
    add("transfer", "thread", _thread, 2 * size)
    add("transfer", "process_pickled", _pickled, 2 * size)
    add("transfer", "process_shared_memory", _shared_memory, 2 * size)
    add("transfer", "process_shared_memory_resident", _resident, 2 * size)
    add("transfer", "ray", _ray, 2 * size, unavailable=cluster.unavailable())
    moved = (config.ranks + 1) * size
    add("combine", "threads", _combine_threads, moved, threads=0)
    add("combine", "processes_gloo", _combine_gloo, moved, threads=0, processes=config.ranks)
    return found
