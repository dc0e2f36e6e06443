"""What processes cost: starting one, handing over to one, pushing bytes to one.

Used by ``labs.calibration``, which runs it as a child of its own (``python -m labs.calibration_processes``
prints JSON): fork is only safe, and its cost only the same every time, where no thread runs and no large
library is loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from labs.calibration_child import figures_of

TIME_OUT_S = 60.0
PAYLOAD_BYTES = 4 * 2**20
ROUND_TRIPS = 300


def _nothing() -> None:
    pass


def _start_s(method: str, runs: int) -> float:
    """Median seconds of start and join of a process that does nothing; the first one is warm-up."""
    context: Any = multiprocessing.get_context(method)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        process = context.Process(target=_nothing)
        process.start()
        process.join(TIME_OUT_S)
        seconds.append(time.perf_counter() - start)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"a process started by {method} ended with {process.exitcode}")
    return statistics.median(seconds[1:])


def _answer(pipe: Connection) -> None:
    """Answer each message with one byte until an empty one comes."""
    while pipe.recv_bytes():
        pipe.send_bytes(b"y")


def _exchange_s(pipe: Connection, message: bytes, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        pipe.send_bytes(message)
        if not pipe.poll(TIME_OUT_S):
            raise RuntimeError(f"no answer through the pipe within {TIME_OUT_S:.0f} s")
        pipe.recv_bytes()
    return (time.perf_counter() - start) / count


def _pipe() -> tuple[float, float]:
    """Seconds of one hand-over, and seconds per byte of a large message."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        round_trip = statistics.median(_exchange_s(here, b"x", ROUND_TRIPS) for _ in range(5))
        payload = os.urandom(PAYLOAD_BYTES)
        large = statistics.median(_exchange_s(here, payload, 2) for _ in range(5))
        here.send_bytes(b"")
        process.join(TIME_OUT_S)
    finally:
        process.kill()
        process.join(TIME_OUT_S)
    return round_trip / 2, max(large - round_trip, 0.0) / PAYLOAD_BYTES


def measure_here() -> dict[str, tuple[float, str]]:
    """name -> (value, source). Forks this process: only for a process without threads."""
    figures: dict[str, tuple[float, str]] = {}
    methods = multiprocessing.get_all_start_methods()
    for method, runs in (("fork", 7), ("forkserver", 5), ("spawn", 3)):
        if method in methods:
            source = f"start and join of one {method} process that does nothing, median of {runs}"
            figures[f"{method}_s"] = (_start_s(method, runs), source)
    if "fork" in methods:
        switch, per_byte = _pipe()
        figures["process_switch_s"] = (switch, "one way of a 1-byte message through a multiprocessing Pipe")
        figures["pipe_s_per_byte"] = (per_byte, "4 MiB through a multiprocessing Pipe, sent and received")
    return figures


def measure() -> dict[str, tuple[float, str]]:
    """The same, measured in a fresh process; RuntimeError when it does not answer in time."""
    return figures_of("labs.calibration_processes", 2 * TIME_OUT_S)


if __name__ == "__main__":
    print(json.dumps(measure_here()))
