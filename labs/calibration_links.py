"""What messages between two processes of this host cost under torch.distributed, over gloo.

Two forked ranks send to each other at the same time, and then play ping-pong with send and receive. An
exchange is not the price of one message: the kernel copies both ways on the ranks' own cores, and each
side's hand-shake waits for the other's threads. Now and then it takes milliseconds: gloo's thread for the
sockets polls on while the rank's own thread holds the lock of the connection (transport/tcp/pair.cc,
``handleEvents``); where that one has been put off its core, it spins until the system's tick takes the core
from it. What many exchanges cost is that too: it is their mean that is kept, not the median. What collectives
cost follows from these (labs/gloo_costs.py).

Used by ``labs.calibration``, which runs it as a child of its own (``python -m labs.calibration_links`` prints
JSON).
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
EXCHANGES, LARGE_EXCHANGES, EXCHANGED_BYTES, WARM_UP = 300, 120, 2**19, 10
SIDE = 200  # of the product between two exchanges
PRODUCTS = 300  # before the first: while both ranks compute, the system gives each a core
ONE_WAY = "through gloo of torch.distributed, one way between two processes, send and receive"
BOTH_WAYS = "through gloo of torch.distributed, each way between two processes at once, isend and irecv"
SOURCES = {
    "gloo_message_s": f"{SMALL_BYTES} bytes {ONE_WAY}",
    "gloo_s_per_byte": f"{LARGE_BYTES} bytes {ONE_WAY}",
    "gloo_exchange_s": f"{SMALL_BYTES} bytes {BOTH_WAYS}, mean of {EXCHANGES}",
    "gloo_exchange_s_per_byte": f"{EXCHANGED_BYTES} bytes {BOTH_WAYS}, mean of {LARGE_EXCHANGES}",
    "torch_woken_call_s": "eight different operations on one element right behind an exchange, per operation",
}


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


def _exchange_s(size: int, count: int) -> tuple[float, float]:
    """Seconds of an exchange, in which both ranks send ``size`` bytes and receive as many, mean of ``count``,
    and of a torch operation right behind one, median. Between two exchanges the ranks compute, so that each
    has a core."""
    import torch
    import torch.distributed as dist

    from labs.calibration_calls import CALLS, several_calls

    out, into = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    factor, product = torch.rand(SIDE, SIDE), torch.empty(SIDE, SIDE)
    peer, calls, now = 1 - dist.get_rank(), several_calls(), time.perf_counter
    exchanges, woken = [], []
    dist.barrier()
    for _ in range(PRODUCTS):
        torch.mm(factor, factor, out=product)
    for _ in range(WARM_UP + count):
        torch.mm(factor, factor, out=product)
        start = now()
        works = dist.irecv(into, peer), dist.isend(out, peer)
        for work in works:
            work.wait()
        middle = now()
        calls()
        exchanges.append(middle - start)
        woken.append((now() - middle) / CALLS)
    return statistics.mean(exchanges[WARM_UP:]), statistics.median(woken[WARM_UP:])


def _rank(rank: int, store: str, pipe: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=TIME_OUT_S)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
    exchange, woken = _exchange_s(SMALL_BYTES, EXCHANGES)  # first: new ranks may still be on one core
    longer, _ = _exchange_s(EXCHANGED_BYTES, LARGE_EXCHANGES)
    small, large = _one_way_s(SMALL_BYTES, ROUND_TRIPS), _one_way_s(LARGE_BYTES, LARGE_TRIPS)
    found = {
        "gloo_message_s": small,
        "gloo_s_per_byte": max(large - small, 0.0) / (LARGE_BYTES - SMALL_BYTES),
        "gloo_exchange_s": exchange,
        "gloo_exchange_s_per_byte": max(longer - exchange, 0.0) / (EXCHANGED_BYTES - SMALL_BYTES),
        "torch_woken_call_s": woken,
    }
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
    return {name: (value, SOURCES[name]) for name, value in found.items()}


def measure() -> dict[str, tuple[float, str]]:
    """The same, measured in a fresh process; RuntimeError when it does not answer in time."""
    return figures_of("labs.calibration_links", 2 * TIME_OUT_S)


if __name__ == "__main__":
    print(json.dumps(measure_here()))
