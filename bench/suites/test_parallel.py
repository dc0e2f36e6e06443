"""``parallel`` beside gloo and PyTorch's own strategies, in the same rounds of one world of processes.

    pytest bench/suites/test_parallel.py [--quick]

Each line is ours against a peer: how many times as fast, with the 95 % interval; the table at the end has
every line, won or lost. A quick run leaves out worlds of 3 and 4 ranks and the largest tensors.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.plugin import Paired
from bench.suites.lines import Line, gathered, table
from bench.suites.parallel_jobs import COPIES, SIZES, STRATEGIES, TOKENS
from bench.world.steps import Worlds

JOBS = "bench.suites.parallel_jobs"
ALL_REDUCE_AIMS = {1 << 12: 8.0, 1 << 16: 4.0, 1 << 20: 3.0, 1 << 22: 3.0, 1 << 24: 3.0, 1 << 26: 3.0}
"""How many times as fast as gloo two ranks are to be; at other sizes, and with more ranks, not slower."""
COMMUNICATION_BOUND_AIM = 1 / 0.8
"""Ours over shm against PyTorch over gloo, at TOKENS tokens a rank."""


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
    found: Any = paired(processes=world_size, seconds=1.0, **jobs)
    aim = ALL_REDUCE_AIMS.get(size, 1.0) if world_size == 2 else 1.0
    name = f"shm all_reduce {_bytes(size)}, {world_size} ranks"
    lines.append(Line(name, "gloo", found.ratio, found.low, found.high, aim))


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
        ratio = found[way]
        name = f"{way}: {strategy} step, {TOKENS} tokens a rank"
        lines.append(Line(name, "torch on gloo", 1 / ratio.ratio, 1 / ratio.high, 1 / ratio.low, aim))


def test_cpu_seconds(benchmark: Any, lines: list[Line]) -> None:
    """The time that both ranks' cores are taken from what else there is to do."""
    worlds = Worlds()
    try:
        for size in (1 << 20, 1 << 24):
            seconds = {}
            for backend in ("shm", "gloo"):
                step = worlds.of_size(2)
                address = f"{JOBS}:cpu_{backend}_{size}"
                step.set_up("", {}, address)
                seconds[backend] = sorted(float(step.call(address)[0]) for _ in range(5))[2]
                step.tear_down(address)
            ratio = seconds["gloo"] / seconds["shm"]
            per_gigabyte = {name: value / COPIES / size * 1e9 for name, value in seconds.items()}
            name = f"shm all_reduce {_bytes(size)}: {per_gigabyte['shm']:.2f} CPU s/GB"
            lines.append(Line(name, f"gloo {per_gigabyte['gloo']:.2f}", ratio, ratio, ratio, 2.0))
    finally:
        worlds.close()
    benchmark(lambda: None)


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
