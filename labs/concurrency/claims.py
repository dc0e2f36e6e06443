"""What the lab teaches, as sentences that the results can refute."""

from __future__ import annotations

import sys
from collections.abc import Callable

from labs.concurrency import hazards, timeline
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of


def has_gil() -> bool:
    """False in a free-threaded build that runs without the lock (PEP 703)."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def _ratio(
    new: str, base: str, decide: Callable[[Interval], bool | None]
) -> Callable[[Results], bool | None]:
    def holds(results: Results) -> bool | None:
        return decide(results.ratio(new, base)) if results.has(new, base) else None

    return holds


def _with_cores(
    holds: Callable[[Results], bool | None], free: Callable[[Results], bool | None]
) -> Callable[[Results], bool | None]:
    """Undecidable with one core or worker; a *no* counts only where ``free`` shows that cores were free."""

    def decided(results: Results) -> bool | None:
        if min(results.machine.cores, results.config.pool) < 2:
            return None
        verdict = holds(results)
        return None if verdict is False and free(results) is not True else verdict

    return decided


def _got_cores(variant: str) -> Callable[[Results], bool | None]:
    """Processes share no lock: had they been given cores, they would have used them."""

    def free(results: Results) -> bool | None:
        if not results.has(variant):
            return None
        return results.cpu_seconds(variant) >= 1.5 * results.seconds(variant).value

    return free


def _with_gil(holds: Callable[[Results], bool | None]) -> Callable[[Results], bool | None]:
    return lambda results: holds(results) if has_gil() else None


def _turns(results: Results) -> bool | None:
    """From the timeline: threads overlap little, processes much."""
    threads, processes = (f"{timeline.GROUP}/{name}" for name in ("threads_python", "processes_python"))
    if not results.has(threads, processes):
        return None
    one = timeline.overlap(timeline.spans(results, threads))
    other = timeline.overlap(timeline.spans(results, processes))
    # The shares of one round, without an interval: what lies between decides nothing, and on a busy
    # machine processes take turns too.
    return all_of(at_most(Interval(one, one - 0.1, one + 0.1), 0.3), True if other >= 0.5 else None)


def _hazard(name: str) -> Callable[[Results], bool | None]:
    def holds(results: Results) -> bool | None:
        if not results.has(hazards.VARIANT):
            return None
        seen = {
            verdict: sum(results.recorded(hazards.VARIANT, f"{name}_{verdict}"))
            for verdict in ("hung", "died")
        }
        return True if any(seen.values()) else None  # a library that was repaired is no failure

    return holds


def _ray_start(results: Results) -> bool | None:
    ray = "per_task/ray"
    if not results.has(ray, "start_up/spawn"):
        return None
    spawn = results.seconds("start_up/spawn")
    start = values_of(results, ray, "start_s")
    return at_least(Interval.exact(start[-1]), 2 * spawn.high) if start else None


_LOCK = (
    "One thread at a time may run bytecode: the lock (GIL) changes hands every 5 ms (sys.getswitchinterval)."
)
_FIXED = (
    "Undecidable where the library was repaired or is not installed: `python -m labs.concurrency.hazards`."
)

CLAIMS = (
    Claim(
        "Threads do not make pure Python faster.",
        _with_gil(_ratio("python_work/threads", "python_work/serial", lambda ratio: at_least(ratio, 0.8))),
        _LOCK + " Not applicable to a free-threaded build.",
    ),
    Claim(
        "Processes make pure Python faster.",
        _with_cores(
            _ratio("python_work/processes", "python_work/serial", lambda ratio: at_most(ratio, 0.9)),
            free=_got_cores("python_work/processes"),
        ),
        "Each process has a GIL of its own. Undecided where other programs had the cores.",
    ),
    Claim(
        "Threads make compiled work faster when it releases the GIL.",
        _with_cores(
            _ratio(
                "numba_work/threads_nogil",
                "numba_work/threads_holding_gil",
                lambda ratio: at_most(ratio, 0.9),
            ),
            free=_ratio("numba_work/processes", "numba_work/serial", lambda ratio: at_most(ratio, 0.75)),
        ),
        "numba holds the lock unless told `nogil=True`: the same machine code then runs on every core.",
    ),
    Claim(
        "Threads make NumPy work faster.",
        _with_cores(
            _ratio("numpy_work/threads", "numpy_work/serial", lambda ratio: at_most(ratio, 0.95)),
            free=_ratio("numpy_work/processes", "numpy_work/serial", lambda ratio: at_most(ratio, 0.75)),
        ),
        "NumPy releases the lock inside calls on more than 500 elements, and takes it again after each: its "
        "calls have to be longer than that. If it fails: set elements higher.",
    ),
    Claim(
        "Threads make waiting faster, even on one core.",
        _ratio("waiting/threads", "waiting/serial", lambda ratio: at_most(ratio, 0.5)),
        "A thread that waits in the kernel holds no lock and needs no core.",
    ),
    Claim(
        "Many waits are shorter in one asyncio loop than in 100 threads.",
        _ratio("many_waits/asyncio", "many_waits/threads_100", lambda ratio: at_most(ratio, 0.9)),
        "A pending coroutine is an object and not a stack: all wait at once, while a pool takes turns.",
    ),
    Claim(
        "In threads pure Python takes turns; in processes it overlaps.",
        _with_gil(_turns),
        _LOCK + " Read from the workers' own notes of when they ran.",
    ),
    Claim(
        "A pool of threads starts at least 5 times faster than one of forked processes.",
        _ratio("start_up/threads", "start_up/fork", lambda ratio: at_most(ratio, 0.2)),
        "A thread is a stack in the same memory; a fork copies page tables, then each page written.",
    ),
    Claim(
        "Spawning takes longer to start than forking.",
        _ratio("start_up/spawn", "start_up/fork", lambda ratio: at_least(ratio, 1.5)),
        "spawn starts a new interpreter and imports everything again; fork inherits both, and the locks.",
    ),
    Claim(
        "Starting a Ray cluster takes longer than starting a pool of processes.",
        _ray_start,
        "A control store, an object store, a scheduler and their agents: it pays for work on many machines.",
    ),
    Claim(
        "A task costs at least 3 times as much in a process as in a thread.",
        _ratio("per_task/processes", "per_task/threads", lambda ratio: at_least(ratio, 3.0)),
        "Pickled, queued, written to a pipe, woken, read, and back again.",
    ),
    Claim(
        "Sending tiny tasks in chunks makes each at least 3 times cheaper.",
        _ratio("per_task/processes_chunked", "per_task/processes", lambda ratio: at_most(ratio, 1 / 3)),
        "The hand-over is paid once a chunk (`chunksize=` of `map`).",
    ),
    Claim(
        "A large array goes through shared memory faster than through pickle.",
        _ratio(
            "transfer/process_shared_memory", "transfer/process_pickled", lambda ratio: at_most(ratio, 0.7)
        ),
        "Pickle copies the bytes, a pipe twice, 64 KiB at a time; shared memory is mapped by both.",
    ),
    Claim(
        "A thread gets a large array for less than a process does.",
        _ratio("transfer/thread", "transfer/process_pickled", lambda ratio: at_most(ratio, 0.5)),
        "Threads share the address space: a reference is passed, nothing is copied.",
    ),
    *(
        Claim(
            f"A known hazard shows itself: {scenario.what}.",
            _hazard(scenario.name),
            f"Expected: {scenario.expected}. Instead: {scenario.advice}. {_FIXED}",
        )
        for scenario in hazards.SCENARIOS
    ),
)
