"""Interleaved, shuffled rounds: how every variant is timed.

1. Each step is called once: the cold call, a result of its own (compilation, page faults, first touch).
2. It is then called until a call is no longer much faster than the one before, and only such warm calls
   decide how many calls make a sample. pytest-benchmark calibrates on the cold call instead; a compiled
   function of 0.12 ms then gets 5 rounds with the compilation among them.
3. Untimed calls go before each short sample. The variant before has left its own code and data in the
   caches and in the branch predictor: the same small step took 68 us among its own calls and 160 us as the
   one call after another variant's. Where a step uses several threads they go on for longer, since the idle
   threads of the variant before may still spin and hold a core (OpenMP's do, for milliseconds). Sleeping
   instead, or shorter spinning, was worse: woken threads then shared one core for whole time slices.
4. In each round every variant is sampled once, in random order. A slow variant sits out some rounds, so
   that all get a similar share of the time; pairs are formed from the rounds both took part in.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.clocks import Clock, HostClock, Step

MIN_SAMPLE_SECONDS = 100e-6  # thousand times the timer's own cost
WARM_SECONDS = MIN_SAMPLE_SECONDS  # of untimed calls, until caches hold one's own code and data
WARM_ABOVE = 3e-3  # samples longer than this do not feel what was in the caches
SETTLE_SECONDS = 3e-3  # of untimed calls, until one's own threads have their cores
SETTLED_ABOVE = 20e-3  # samples longer than this do not feel who held them
MIN_ROUNDS, MAX_ROUNDS = 3, 1000
WARM_CALLS = 5
SIGN_SECONDS = 10.0


@dataclass
class Timed:
    """A step with its clock, and what was measured of it."""

    step: Step
    clock: Clock = field(default_factory=HostClock)
    max_rounds: int = 0
    before_sample: Callable[[], None] | None = None
    after_sample: Callable[[], None] | None = None
    cold_seconds: float = math.nan
    output: object = None
    iterations: int = 1
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    warm_seconds: float = math.nan
    threaded: bool = False  # its warm calls took more CPU than wall time
    settle_seconds: float = 0.0  # so long untimed calls go before each sample


class CpuMeter:
    """CPU seconds of this process, of the children that it has waited for, and of those that live."""

    def __init__(self) -> None:
        self._process = None

    def watch_children(self) -> None:
        """Count children from now on, if there are any (reading them costs some 50 us each).

        A GPU machine may lack psutil: there this process alone is counted.
        """
        try:
            import psutil
        except ImportError:
            return
        process = psutil.Process()
        self._process = process if process.children() else None

    def read(self) -> float:
        # A child that ends inside a step is gone from the living by then, and counted as waited for.
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = time.process_time() + ended.ru_utime + ended.ru_stime
        if self._process is not None:
            import psutil

            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    total += times.user + times.system + times.children_user + times.children_system
        return total


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection inside a sample; what accumulated is collected before."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def call_cold(timed: Timed) -> None:
    """The first call: its time and its output."""
    start = time.perf_counter()
    timed.output = timed.step()
    timed.clock.wait(timed.output)
    timed.cold_seconds = time.perf_counter() - start


def warm_up(timed: Timed, limit_seconds: float) -> None:
    """Call until the time has settled; sets ``warm_seconds`` and ``iterations``."""
    if timed.max_rounds == 1:  # too costly or too destructive to repeat: the cold call is the result
        timed.warm_seconds = timed.cold_seconds
        timed.rounds, timed.seconds = [0], [timed.cold_seconds]
        return
    cpu, start = time.process_time(), time.perf_counter()
    best = math.inf
    for _ in range(WARM_CALLS):
        seconds = timed.clock.sample(timed.step, 1)
        settled = seconds > 0.8 * best
        best = min(best, seconds)
        if settled or time.perf_counter() - start > limit_seconds:
            break
    if best < SETTLED_ABOVE:  # short: the calls above may have been few and unsettled
        cpu, start = time.process_time(), time.perf_counter()
        timed.clock.sample(timed.step, max(1, math.ceil(SETTLE_SECONDS / max(best, 1e-9))))
    timed.threaded = time.process_time() - cpu > 1.2 * (time.perf_counter() - start)
    least = getattr(timed.clock, "least_seconds", MIN_SAMPLE_SECONDS)
    while best * timed.iterations < least:
        timed.iterations = max(timed.iterations * 2, math.ceil(least / max(best, 1e-9) / 2))
        best = timed.clock.sample(timed.step, timed.iterations)
    timed.warm_seconds = best


def plan_strides(
    sample_seconds: Sequence[float], budget_seconds: float, limits: Sequence[int]
) -> tuple[int, list[int]]:
    """(rounds, stride of each variant): a variant takes part in every stride-th round.

    Each gets about an equal share of the budget and at least 3 rounds. Strides are powers of two, so that
    the rounds of a slow variant are a subset of those of a faster one and every pair of variants meets. One
    with a limit leaves when it has had so many (``takes_part``).
    """
    share = budget_seconds / len(sample_seconds)
    counts = []
    for seconds, limit in zip(sample_seconds, limits, strict=True):
        count = min(MAX_ROUNDS, max(MIN_ROUNDS, int(share / max(seconds, 1e-9))))
        counts.append(min(count, limit) if limit else count)
    total = max(counts)
    strides = []
    for count in counts:
        stride = 1
        while -(-total // (2 * stride)) >= count:
            stride *= 2
        strides.append(stride)
    return total, strides


def takes_part(index: int, stride: int, limit: int) -> bool:
    """Whether a variant of this stride and at most ``limit`` rounds (0: any number) is in round ``index``."""
    return index % stride == 0 and (not limit or index // stride < limit)


def raise_it(name: str, error: Exception) -> None:
    raise error


def run_rounds(
    variants: Mapping[str, Timed],
    budget_seconds: float,
    *,
    on_error: Callable[[str, Exception], None] = raise_it,
    on_sign: Callable[[str], None] = lambda sign: None,
) -> None:
    """Time all variants, warm already, for about ``budget_seconds``, filling in their samples.

    on_error: told of a step that raises; where it returns, the others go on without that one.
    on_sign: told between samples, every ``SIGN_SECONDS``, how far the rounds are.
    """
    names = [name for name, timed in variants.items() if timed.max_rounds != 1]
    if not names:
        return
    threaded = any(variants[name].threaded for name in names)
    costs = []
    for name in names:
        timed = variants[name]
        costs.append(timed.warm_seconds * timed.iterations)
        timed.settle_seconds = _settle_seconds(costs[-1], threaded) if len(names) > 1 else 0.0
        if timed.settle_seconds:
            costs[-1] += max(timed.settle_seconds, timed.warm_seconds)
    total, strides = plan_strides(
        costs,
        budget_seconds,
        [variants[name].max_rounds for name in names],
    )
    meter = CpuMeter()
    meter.watch_children()
    shuffle = random.Random(total)
    with _collector_paused():  # collecting a large heap takes a while, which is no part of the budget
        said = time.perf_counter()
        deadline = said + budget_seconds
        limits = {name: variants[name].max_rounds for name in names}
        stride_of = dict(zip(names, strides, strict=True))
        for index in range(total):
            taking_part = [name for name in stride_of if takes_part(index, stride_of[name], limits[name])]
            shuffle.shuffle(taking_part)
            for name in taking_part:
                try:
                    _sample(variants[name], index, meter)
                except Exception as error:
                    on_error(name, error)
                    del stride_of[name]
                if time.perf_counter() > said + SIGN_SECONDS:
                    said = time.perf_counter()
                    on_sign(f"round {index + 1} of {total}")
            enough = all(
                len(variants[name].seconds) >= min(MIN_ROUNDS, limits[name] or MIN_ROUNDS)
                for name in stride_of
            )
            if enough and time.perf_counter() > deadline:
                break  # the machine is slower than the warm calls said: stop at a whole round


def _settle_seconds(sample_seconds: float, threaded: bool) -> float:
    """Of untimed calls before a sample of so many seconds that follows another variant's."""
    if threaded and sample_seconds < SETTLED_ABOVE:
        return SETTLE_SECONDS
    return WARM_SECONDS if sample_seconds < WARM_ABOVE else 0.0


def time_together(variants: Mapping[str, Timed], seconds: float) -> None:
    """Cold calls, then warm-up and rounds of all variants in about ``seconds``, filling in their samples.

    The first call may compile for longer than that, so it is not counted.
    """
    for timed in variants.values():
        call_cold(timed)
        timed.output = None
    start = time.perf_counter()
    for timed in variants.values():
        warm_up(timed, seconds / 4 / len(variants))
    run_rounds(variants, max(0.1 * seconds, seconds - (time.perf_counter() - start)))


def _sample(timed: Timed, index: int, meter: CpuMeter) -> None:
    if timed.settle_seconds:
        settled = time.perf_counter() + timed.settle_seconds
        while True:
            timed.clock.sample(timed.step, 1)
            if time.perf_counter() > settled:
                break
    if timed.before_sample is not None:
        timed.before_sample()
    cpu = meter.read()
    seconds = timed.clock.sample(timed.step, timed.iterations)
    timed.cpu_seconds.append((meter.read() - cpu) / timed.iterations)
    timed.seconds.append(seconds)
    timed.rounds.append(index)
    if timed.after_sample is not None:
        timed.after_sample()


def pairs(base: Timed, new: Timed) -> tuple[list[float], list[float]]:
    """Seconds of base and new from the rounds that both took part in."""
    base_at = dict(zip(base.rounds, base.seconds, strict=True))
    both = [
        (base_at[index], seconds)
        for index, seconds in zip(new.rounds, new.seconds, strict=True)
        if index in base_at
    ]
    return [pair[0] for pair in both], [pair[1] for pair in both]
