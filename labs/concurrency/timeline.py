"""Who ran when: workers note when each small piece of work began and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from labs.concurrency import pools, workers
from labs.concurrency.config import Config
from labs.figure import Span, Timeline
from labs.lab import Recorder, Results, Step, Variant, values_of

GROUP = "who_ran_when"
PIECES = 60  # a worker; a piece of the quick Python work lasts some 0.3 ms, the GIL's turn is 5 ms
ROWS = 4  # workers shown


def shown(config: Config) -> int:
    return min(max(2, config.pool), ROWS)


def _record(recorder: Recorder, found: list[list[tuple[float, float]]]) -> int:
    for worker, pieces in enumerate(found):
        for begin, end in pieces:
            recorder.record(f"worker{worker}_begin", begin, "s")
            recorder.record(f"worker{worker}_end", end, "s")
    return sum(len(pieces) for pieces in found)


def _python(kind: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        count = shown(config)
        pool = pools.thread_pool(count) if kind == "threads" else pools.process_pool(count)
        each = [(PIECES, max(1, config.iterations // 25))] * count
        return pools.Step(lambda: _record(recorder, pool.run(workers.slices, each)), pool.close)

    return setup


def _compiled(config: Config, recorder: Recorder) -> Step:
    """Compiled work that holds no lock; only taking the time between two pieces needs the GIL."""
    from labs.concurrency.numba_work import compiled_work

    count = shown(config)
    pool, iterations = pools.thread_pool(count), max(1, config.numba_iterations // 25)

    def pieces() -> list[tuple[float, float]]:
        stamps = []
        for _ in range(PIECES):
            begin = recorder.now()
            compiled_work(iterations)
            stamps.append((begin, recorder.now()))
        return stamps

    return pools.Step(lambda: _record(recorder, pool.run(pieces, [()] * count)), pool.close)


def variants(config: Config) -> Sequence[Variant]:
    return [
        Variant(GROUP, "threads_python", _python("threads"), threads=0, max_rounds=5),
        Variant(GROUP, "processes_python", _python("processes"), threads=0, max_rounds=5),
        Variant(GROUP, "threads_numba_nogil", _compiled, threads=0, max_rounds=5),
    ]


def spans(results: Results, variant: str) -> list[list[Span]]:
    """A list of spans for each worker, in seconds from the first beginning.

    A piece that took more than twice the median was interrupted: its worker waited for the GIL or
    the core within it. Such a piece is left out, so that a gap shows the wait.
    """
    rows = []
    for worker in range(ROWS):
        begins = values_of(results, variant, f"worker{worker}_begin")
        ends = values_of(results, variant, f"worker{worker}_end")
        if len(begins):
            rows.append(list(zip(begins, ends, strict=True)))
    if not rows:
        return []
    first = min(begin for row in rows for begin, _ in row)
    usual = median(end - begin for row in rows for begin, end in row)
    found = []
    for row in rows:
        merged: list[Span] = []
        for begin, end in row:
            if end - begin > 2 * usual:
                continue
            if merged and begin - first - merged[-1].end < usual / 4:  # the next piece of the same turn
                merged[-1] = Span(merged[-1].begin, end - first)
            else:
                merged.append(Span(begin - first, end - first))
        found.append(merged)
    return found


def overlap(rows: Sequence[Sequence[Span]]) -> float:
    """The share of the time in which anyone ran during which at least two ran; NaN without spans."""
    edges = sorted(
        [(span.begin, 1) for row in rows for span in row] + [(span.end, -1) for row in rows for span in row]
    )
    running, last, busy, together = 0, 0.0, 0.0, 0.0
    for moment, change in edges:
        if running >= 1:
            busy += moment - last
        if running >= 2:
            together += moment - last
        running, last = running + change, moment
    return together / busy if busy else float("nan")


def figures(results: Results) -> Sequence[Timeline]:
    titles = {
        "threads_python": "Threads, pure Python: they take turns",
        "processes_python": "Processes, pure Python: they run together",
        "threads_numba_nogil": "Threads, compiled work without the GIL: they run together",
    }
    found = []
    for name, title in titles.items():
        variant = f"{GROUP}/{name}"
        rows = spans(results, variant) if results.has(variant) else []
        if rows:
            named = [(f"worker {index}", row) for index, row in enumerate(rows)]
            note = (
                f"Two or more ran during {100 * overlap(rows):.0f} % of the time in which any ran. "
                "A gap is a wait for the GIL or for a core."
            )
            found.append(Timeline(title, named, note=note))
    return found
