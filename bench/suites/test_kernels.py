"""``kernels`` beside the best peer: every line of ``kernels.spec.benchmarks()``, in both allocator columns.

    pytest bench/suites/test_kernels.py --quick [--device cuda]

Each line is timed in interleaved rounds in one process: ours, torch eager, torch.compile, the peers that its
family names, and ``limit``, a copy of as many bytes as the operation must move, or a pass in place for what
is updated in place. The speed-up is against the fastest peer, the fraction is limit / ours; products are also
held against the cores' FLOP/s, measured in the same run. The allocator is fixed when a process starts (with
glibc's default a large output is page-faulted anew at every call), so the tuned column is measured by a child
process. The table stands at the end of the run. A quick run times only the lines for which ``kernels.spec``
states a target.

A peer whose best warm call takes several times as long as another's is not the fastest: its rounds are
spared, and it is named below the table. One that takes tens of times as long is not called in the other
column, since an allocator makes a few times of it at most; and where a call takes seconds, it is called once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.environment import allocator_environment, allocator_mode
from bench.plugin import Paired, register
from bench.suites.kernel_table import Row, render
from bench.suites.lines import gathered
from kernels.op import without_crossover
from kernels.spec import Benchmark, Step, benchmarks

SECONDS_PER_WAY = {"quick": 0.2, "full": 3.0}
HOPELESS = 4.0
"""A peer so many times slower than the fastest in its best call is not timed."""
BEYOND_HOPE = 20.0
"""Nor called again, when it is so much slower."""
COMPILERS = ("torch.compile", "jax.jit", "flex_attention")
"""Peers that compile in their first call."""
LONG = 5.0
"""Seconds of a call that no mere interruption has made."""
CALLS, CALLS_SECONDS = 5, 0.1


@cache
def lines(aimed: bool = False) -> dict[str, Benchmark]:
    """Name -> line, or only those with a target. Their bytes are counted on real arguments, which take 3 s to
    make for all."""
    return {line.name: line for line in benchmarks(aimed)}


def _lines(config: pytest.Config) -> dict[str, Benchmark]:
    """Those that this run times: a quick one, those with a target."""
    return lines(config.getoption("perflab_scale") == "quick")


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[Row]:
    return gathered(pytestconfig, render)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    import torch

    device = pytestconfig.getoption("perflab_device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no CUDA device here", returncode=2)
    return device


def _limit(line: Benchmark, device: str) -> Callable[[], object]:
    """What moves as many bytes as the operation must, as fast as this machine does: a copy, or a pass in
    place, which is faster, since no line is fetched only to be overwritten."""
    import torch

    if line.rewritten and device == "cpu":
        from kernels.copy import rewrite

        elements = line.bytes_moved // 4 // (2 * line.rewritten + 1)
        gradient, states = torch.rand(elements), torch.rand(line.rewritten, elements)
        return lambda: rewrite(gradient, states)
    elements = max(1024, line.bytes_moved // 8)
    source, target = torch.rand(elements, device=device), torch.empty(elements, device=device)
    if device == "cuda":
        return lambda: target.copy_(source)
    # Past the caches where they would only be filled in vain; which is faster depends on the size.
    import timeit

    from kernels.copy import copy, streamed_copy

    ways = [lambda: copy(source, target), lambda: streamed_copy(source, target)]
    return min(ways, key=lambda way: min(timeit.repeat(way, number=1, repeat=5)))


@cache
def _peaks() -> dict[str, float]:
    """FLOP/s of all cores by dtype; bfloat16's without a unit of its own is float32's."""
    from labs.calibration_hardware import peaks
    from labs.machine import usable_cores

    found = {name: value for name, (value, _) in peaks(usable_cores()).items()}
    single = found["vector_float32_all_flops"]
    return {"float32": single, "bfloat16": found.get("matrix_bfloat16_all_flops", single)}


def _peak(line: Benchmark, device: str) -> float | None:
    return _peaks().get(str(line.dtype).removeprefix("torch.")) if line.flops and device == "cpu" else None


def _held(line: Benchmark, device: str, ways: Mapping[str, Step]) -> dict[str, int | None] | None:
    """By how much a call of each grows memory, where that is what the operation is for."""
    from labs.memory import extra_bytes

    if not line.holds_less or device != "cpu":
        return None
    return {name: extra_bytes(step) for name, step in ways.items()}


def _contenders(
    peers: Mapping[str, Step], known: Mapping[str, float] | None = None
) -> tuple[dict[str, Step], dict[str, float]]:
    """The peers that may be the fastest, and how many times slower the others are in their best call.

    known: the latter as another column found them; who is ``BEYOND_HOPE`` there is neither called nor named.
    """
    import timeit

    peers = {name: step for name, step in peers.items() if (known or {}).get(name, 0.0) <= BEYOND_HOPE}
    # Compiling takes seconds, which are no part of a comparison.
    first = {name: timeit.timeit(step, number=1) for name, step in peers.items()}
    best: dict[str, float] = {}
    for name in sorted(peers, key=lambda name: first[name]):
        far = best and first[name] > max(LONG, BEYOND_HOPE * min(best.values()))
        once = far and name not in COMPILERS
        best[name] = first[name] if once else timeit.timeit(peers[name], number=1)
    doubtful = {name for name in best if best[name] < CALLS_SECONDS or first[name] > 2 * best[name]}
    for name in doubtful:  # one slow call leaves nobody out, two long ones that agree do
        if best[name] > HOPELESS * min(best.values()):
            calls = CALLS if best[name] < CALLS_SECONDS else 1
            best[name] = min(best[name], *timeit.repeat(peers[name], number=1, repeat=calls))
    fastest = min(best.values())
    slower = {name: best[name] / fastest for name in peers if best[name] > HOPELESS * fastest}
    return {name: step for name, step in peers.items() if name not in slower}, slower


@cache
def _left_out(path: str | None) -> dict[str, dict[str, float]]:
    """Line -> the peers that were left out where this file was written."""
    return json.loads(Path(path).read_text()) if path else {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A quick run times the lines that have a target."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(_lines(metafunc.config)))


@pytest.fixture
def every_size() -> Iterator[None]:
    """The kernels themselves are timed, also where the public function would rather call torch."""
    with without_crossover():
        yield


@pytest.mark.usefixtures("every_size")
def test_kernel(name: str, paired: Paired, device: str, rows: list[Row], pytestconfig: pytest.Config) -> None:
    line = _lines(pytestconfig)[name]
    peers = dict(line.ways(device))
    ours = peers.pop("kernels")
    known = _left_out(pytestconfig.getoption("perflab_left_out")).get(name)
    ways, left_out = _contenders(peers, known) if device == "cpu" else (peers, {})
    compared = list(ways)
    if line.bytes_moved:  # the limit goes along in the same rounds
        ways["limit"] = _limit(line, device)
    seconds = SECONDS_PER_WAY.get(pytestconfig.getoption("perflab_scale"), 1.0) * (1 + len(ways))
    clock = "cuda" if device == "cuda" else "host"
    functions: dict[str, Any] = {"kernels": ours, **ways}
    results: Any = paired(seconds=seconds, clock=clock, **functions)
    if len(ways) == 1:
        results = {next(iter(ways)): results}
    against = {peer: results[peer] for peer in compared}
    held = _held(line, device, {name: functions[name] for name in ("kernels", *compared)})
    row = Row.of(line, allocator_mode(), paired.medians, against, left_out, _peak(line, device), held)
    rows.append(row)
    paired.extra_info["kernels"]["row"] = vars(row)


@pytest.mark.timeout(3600)
def test_tuned_column(benchmark: Any, device: str, rows: list[Row], pytestconfig: pytest.Config) -> None:
    """The same lines in a process whose malloc keeps its memory."""
    if benchmark.disabled or allocator_mode() == "tuned" or device == "cuda":
        pytest.skip("the tuned column is this run's own, or means nothing here")
    if not rows:
        pytest.skip("no line was measured")
    scale = pytestconfig.getoption("perflab_scale")
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "tuned.json"
        tests = [f"{__file__}::test_kernel[{row.name}]" for row in rows]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        command += [f"--benchmark-json={saved}", *([f"--{scale}"] if scale else [])]
        known = Path(folder) / "left_out.json"
        known.write_text(json.dumps({row.name: row.left_out for row in rows}))
        command.append(f"--perflab-left-out={known}")
        environment = {**os.environ, **allocator_environment("tuned")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        for entry in json.loads(saved.read_text())["benchmarks"]:
            stats, extra, group = entry["stats"], entry["extra_info"], entry["group"]
            if "row" in extra:
                rows.append(Row(**extra["row"]))
            name = f"{entry['param']}/tuned"
            register(benchmark, name, stats["data"], stats["iterations"], extra, group)
