"""``parallel`` beside gloo and PyTorch's own strategies, in the same rounds of one world of processes.

    pytest bench/suites/test_parallel.py [--quick] [--benchmark-json=docs/parallel.json]

Each line is ours against a peer: how many times as fast, with the 95 % interval; the table at the end has
every line, won or lost. A quick run leaves out worlds of 3 and 4 ranks and the largest tensors.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from bench.plugin import Paired, register
from bench.stats import Comparison, compare_pairs
from bench.suites.lines import Line, gathered, table
from bench.suites.parallel_jobs import COPIES, EXCHANGED, SIZES, STRATEGIES, TOKENS
from bench.world.steps import Worlds, WorldStep

JOBS = "bench.suites.parallel_jobs"
ALL_REDUCE_AIMS = {1 << 12: 8.0, 1 << 16: 4.0, 1 << 20: 3.0, 1 << 22: 3.0, 1 << 24: 3.0, 1 << 26: 3.0}
"""How many times as fast as gloo two ranks are to be; at other sizes, and with more ranks, not slower."""
COMMUNICATION_BOUND_AIM = 1 / 0.8
"""Ours over shm against PyTorch over gloo, at TOKENS tokens a rank."""
CPU_AIM, CPU_ROUNDS = 2.0, 15


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[Line]:
    return gathered(pytestconfig, render)


def render(lines: list[Line], width: int) -> str:
    title = "parallel beside its peers (speed-up = peer / ours)"
    return table(lines, width, title=title, ratio="speed-up", digits=2, unit="x")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("perflab_scale") == "quick"
    if "size" in metafunc.fixturenames:
        sizes = [size for size in SIZES if not quick or size <= 1 << 22]
        metafunc.parametrize("size", sizes)
    if "world_size" in metafunc.fixturenames:
        metafunc.parametrize("world_size", (2,) if quick else (2, 3, 4))


def test_all_reduce(world_size: int, size: int, paired: Paired, lines: list[Line]) -> None:
    jobs: dict[str, Any] = {name: f"{JOBS}:all_reduce_{name}_{size}" for name in ("shm", "gloo")}
    if exchanged := world_size == 2 and size == EXCHANGED:
        jobs["exchange"] = f"{JOBS}:exchange_{size}"
    found: Any = paired(processes=world_size, seconds=0.5 * len(jobs), **jobs)
    if not exchanged:
        found = {"gloo": found}
    aim = ALL_REDUCE_AIMS.get(size, 1.0) if world_size == 2 else 1.0
    line = _line(f"shm all_reduce {_bytes(size)}, {world_size} ranks", "gloo", found["gloo"], aim)
    lines.append(line)
    _save(paired, "shm", "gloo", line, ranks=world_size, bytes=size)
    if exchanged:
        name = f"shm exchange alone {_bytes(size)}, 2 ranks"
        line = _line(name, "shm all_reduce", found["exchange"], None, inverse=True)
        lines.append(line)
        _save(paired, "exchange", "shm", line, ranks=2, bytes=size)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step(strategy: str, paired: Paired, lines: list[Line]) -> None:
    """PyTorch's over gloo, which most people run, beside ours over gloo, and both over shm."""
    order = (("torch", "gloo"), ("ours", "gloo"), ("ours", "shm"), ("torch", "shm"))
    jobs: dict[str, Any] = {
        f"{side} on {backend}": f"{JOBS}:train_{side}_{strategy}_{backend}" for side, backend in order
    }
    found: Any = paired(processes=2, seconds=6.0, **jobs)
    aims = {"ours on gloo": 1.0, "ours on shm": COMMUNICATION_BOUND_AIM, "torch on shm": None}
    for way, aim in aims.items():
        name = f"{way}: {strategy} step, {TOKENS} tokens a rank"
        line = _line(name, "torch on gloo", found[way], aim, inverse=True)
        lines.append(line)
        _save(paired, way, "torch on gloo", line, ranks=2)


@pytest.mark.parametrize("cpu_size", [1 << 20, 1 << 24])
def test_cpu_seconds(cpu_size: int, benchmark: Any, lines: list[Line]) -> None:
    """The time that both ranks' cores are taken from what else there is to do: CPU seconds of an all_reduce,
    of both ranks together, in shuffled rounds."""
    if benchmark.disabled:
        pytest.skip("CPU seconds are measured, not tried")
    worlds, shuffle = Worlds(), random.Random(cpu_size)
    seconds: dict[str, list[float]] = {"shm": [], "gloo": []}
    try:
        world = worlds.of_size(2)
        steps = {name: WorldStep(world, "", {}, f"{JOBS}:cpu_{name}_{cpu_size}") for name in seconds}
        for _ in range(CPU_ROUNDS):
            order = list(steps)
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(float(steps[name]()[0]) / COPIES)
    finally:
        worlds.close()
    found = compare_pairs(seconds["shm"], seconds["gloo"])
    median = {name: sorted(samples)[CPU_ROUNDS // 2] for name, samples in seconds.items()}
    line = _line(f"shm all_reduce {_bytes(cpu_size)}, 2 ranks, CPU seconds", "gloo", found, CPU_AIM)
    lines.append(line)
    saved = _saved(line, median["shm"], median["gloo"], ranks=2, bytes=cpu_size)
    for name, extra in (("shm", {"line": saved}), ("gloo", {})):
        register(benchmark, name, seconds[name], 1, extra, None)


def _line(name: str, peer: str, found: Comparison, aim: float | None, *, inverse: bool = False) -> Line:
    """found: the peer compared with ours, so that its ratio is our speed-up; inverse: ours with the peer."""
    if inverse:
        low, high = (1 / bound if bound else math.inf for bound in (found.high, found.low))
        return Line(name, peer, 1 / found.ratio, low, high, aim)
    return Line(name, peer, found.ratio, found.low, found.high, aim)


def _save(paired: Paired, ours: str, peer: str, line: Line, **what: int) -> None:
    """The line, beside the samples of our side."""
    seconds = paired.medians[ours], paired.medians[peer]
    paired.extra_info[ours]["line"] = _saved(line, *seconds, **what)


def _saved(line: Line, seconds: float, peer_seconds: float, **what: int) -> dict[str, Any]:
    return {**vars(line), "seconds": seconds, "peer_seconds": peer_seconds, **what}


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
