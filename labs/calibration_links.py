"""What messages between two processes of this host cost under torch.distributed, over gloo.

Two forked ranks play ping-pong with send and receive, and then send to each other at the same time. An
exchange is not the price of one message: gloo's loopback copies in the kernel, on the ranks' own cores, and
each direction's hand-shake waits for the other's threads. What collectives cost follows from both by the
alpha-beta model (labs/gloo_costs.py). Used by ``labs.calibration``, which runs it as a child of its own
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
ROUND_TRIPS, LARGE_TRIPS, SAMPLES = 30, 3, 7


def _one_way_s(size: int, trips: int) -> float:
    """Median seconds of one message of ``size`` bytes, one way; the first sample is warm-up."""
    import torch
    import torch.distributed as dist

    message, peer, seconds = torch.ones(size, dtype=torch.uint8), 1 - dist.get_rank(), []
    for _ in range(SAMPLES + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(trips):
            if peer:
                dist.send(message, peer)
                dist.recv(message, peer)
            else:
                dist.recv(message, peer)
                dist.send(message, peer)
        seconds.append((time.perf_counter() - start) / (2 * trips))
    return statistics.median(seconds[1:])


def _exchange_s(size: int, trips: int) -> tuple[float, float]:
    """Median seconds of an exchange, in which both ranks send ``size`` bytes and receive as many, and of a
    torch operation right behind one; the first sample is warm-up."""
    import torch
    import torch.distributed as dist

    from labs.calibration_calls import CALLS, several_calls

    out, into, peer = (
        torch.ones(size, dtype=torch.uint8),
        torch.empty(size, dtype=torch.uint8),
        1 - dist.get_rank(),
    )
    calls, now, exchanges, woken = several_calls(), time.perf_counter, [], []
    for _ in range(SAMPLES + 1):
        exchanging = calling = 0.0
        dist.barrier()
        for _ in range(trips):
            start = now()
            works = dist.irecv(into, peer), dist.isend(out, peer)
            for work in works:
                work.wait()
            middle = now()
            calls()
            exchanging, calling = exchanging + middle - start, calling + now() - middle
        exchanges.append(exchanging / trips)
        woken.append(calling / trips / CALLS)
    return statistics.median(exchanges[1:]), statistics.median(woken[1:])


def _line(small: float, large: float) -> tuple[float, float]:
    """Seconds of a message without bytes, and of a byte."""
    return small, max(large - small, 0.0) / (LARGE_BYTES - SMALL_BYTES)


def _rank(rank: int, store: str, pipe: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=TIME_OUT_S)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
    message = _one_way_s(SMALL_BYTES, ROUND_TRIPS), _one_way_s(LARGE_BYTES, LARGE_TRIPS)
    exchange, woken = _exchange_s(SMALL_BYTES, ROUND_TRIPS)
    exchanges = exchange, _exchange_s(LARGE_BYTES, LARGE_TRIPS)[0]
    found = {"message": _line(*message), "exchange": _line(*exchanges)}
    if rank == 0:
        pipe.send((found, woken))
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
            found, woken = here.recv()
            for process in ranks:
                process.join(TIME_OUT_S)
        except EOFError:
            raise RuntimeError("a rank ended before it had measured") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
    figures: dict[str, tuple[float, str]] = {}
    kinds = (
        ("message", "", "one way between two processes, send and receive"),
        ("exchange", "exchange_", "each way between two processes at the same time, irecv and isend"),
    )
    for name, prefix, text in kinds:
        latency, per_byte = found[name]
        source = f"bytes through gloo of torch.distributed, {text}"
        figures[f"gloo_{name}_s"] = (latency, f"{SMALL_BYTES} {source}")
        figures[f"gloo_{prefix}s_per_byte"] = (per_byte, f"{LARGE_BYTES} {source}")
    source = "eight different operations on one element, right behind a wait for a message, per operation"
    figures["torch_woken_call_s"] = (woken, source)
    return figures


def measure() -> dict[str, tuple[float, str]]:
    """The same, measured in a fresh process; RuntimeError when it does not answer in time."""
    return figures_of("labs.calibration_links", 2 * TIME_OUT_S)


if __name__ == "__main__":
    print(json.dumps(measure_here()))
