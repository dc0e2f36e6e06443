"""What a message between two processes of this host costs under torch.distributed, over gloo and over shm.

Two forked ranks play ping-pong with send and receive; what collectives cost follows from it by the alpha-beta
model (parallel/collective_costs.py). Used by ``labs.calibration``, which runs it as a child of its own
(``python -m labs.calibration_links`` prints JSON).
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from labs.calibration_child import figures_of

TIME_OUT_S = 60.0
SMALL_BYTES, LARGE_BYTES = 64, 2**20
ROUND_TRIPS, LARGE_TRIPS, SAMPLES = 50, 4, 7
BACKENDS = ("gloo", "shm")


def _one_way_s(group: Any, size: int, trips: int) -> float:
    """Median seconds of one message of ``size`` bytes, one way; the first sample is warm-up."""
    import torch
    import torch.distributed as dist

    message, peer, seconds = torch.ones(size, dtype=torch.uint8), 1 - dist.get_rank(), []
    for _ in range(SAMPLES + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(trips):
            if peer:
                dist.send(message, peer, group=group)
                dist.recv(message, peer, group=group)
            else:
                dist.recv(message, peer, group=group)
                dist.send(message, peer, group=group)
        seconds.append((time.perf_counter() - start) / (2 * trips))
    return statistics.median(seconds[1:])


def _rank(rank: int, store: str, pipe: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    import parallel.shm  # noqa: F401 (registers the backend)

    torch.set_num_threads(1)
    limit = timedelta(seconds=TIME_OUT_S)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
    found = {}
    for backend in BACKENDS:
        group = dist.new_group(backend=backend, timeout=limit)
        small = _one_way_s(group, SMALL_BYTES, ROUND_TRIPS)
        large = _one_way_s(group, LARGE_BYTES, LARGE_TRIPS)
        found[backend] = small, max(large - small, 0.0) / (LARGE_BYTES - SMALL_BYTES)
        dist.destroy_process_group(group)
    if rank == 0:
        pipe.send(found)
    dist.destroy_process_group()


def measure_here() -> dict[str, tuple[float, str]]:
    """name -> (value, source). Forks two ranks and waits for them; RuntimeError when they do not answer."""
    import torch.distributed  # before the fork: once instead of twice

    if not torch.distributed.is_available():
        raise RuntimeError("this torch has no torch.distributed")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [context.Process(target=_rank, args=(rank, store, there), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        there.close()
        try:
            if not here.poll(TIME_OUT_S):
                raise RuntimeError(f"two ranks did not exchange their messages within {TIME_OUT_S:.0f} s")
            found = here.recv()
            for process in ranks:
                process.join(TIME_OUT_S)
        except EOFError:
            raise RuntimeError("a rank ended before it had measured") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
    figures: dict[str, tuple[float, str]] = {}
    for backend, (latency, per_byte) in found.items():
        text = f"through {backend} of torch.distributed, one way between two processes, send and receive"
        figures[f"{backend}_message_s"] = (latency, f"{SMALL_BYTES} bytes {text}")
        figures[f"{backend}_s_per_byte"] = (per_byte, f"{LARGE_BYTES} bytes {text}")
    return figures


def measure() -> dict[str, tuple[float, str]]:
    """The same, measured in a fresh process; RuntimeError when it does not answer in time."""
    return figures_of("labs.calibration_links", 2 * TIME_OUT_S)


if __name__ == "__main__":
    print(json.dumps(measure_here()))
