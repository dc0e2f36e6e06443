"""``parallel.pipeline`` beside PyTorch's pipelining and beside the simulator, on virtual devices.

    pytest bench/suites/test_pipeline.py [--quick]

Both run in the same rounds of one world of processes, whose stages sleep (``parallel.virtual``): what is
compared is order and overhead, not speed of computing. Two lines a schedule: ours against PyTorch's
counterpart, and the simulated step (set unit times, no latency, no overhead) over the measured one, which is
realised efficiency divided by that of the schedule. A quick run leaves out 8 ranks.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.plugin import Paired
from bench.suites.lines import Line, gathered, table
from bench.suites.pipeline_jobs import TORCH, UNIT
from parallel import schedules

JOBS = "bench.suites.pipeline_jobs"
MICROBATCHES = 8
EFFICIENCY_AIMS = {4: 0.98, 8: 0.95}
"""Of what the simulator says, by the number of ranks, with units of 25 ms."""


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[Line]:
    return gathered(pytestconfig, render)


def render(lines: list[Line], width: int) -> str:
    unit = f"units of {UNIT * 1e3:.0f} ms"
    title = f"pipelines on virtual devices, {unit} (peer / ours; simulated / measured)"
    return table(lines, width, title=title, ratio="ratio", digits=3)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world_size" in metafunc.fixturenames:
        quick = metafunc.config.getoption("perflab_scale") == "quick"
        metafunc.parametrize("world_size", (4,) if quick else (4, 8))


@pytest.mark.parametrize("name", schedules.NAMES)
def test_step(world_size: int, name: str, paired: Paired, lines: list[Line]) -> None:
    schedule = schedules.build(name, world_size, MICROBATCHES)
    seconds = schedules.simulate(schedule, schedules.Durations(UNIT, UNIT, UNIT)).step
    sides = ["ours", "simulated", *(["torch"] if name in TORCH else [])]
    jobs: dict[str, Any] = {side: f"{JOBS}:virtual_{side}_{name}_{MICROBATCHES}" for side in sides}
    found: Any = paired(processes=world_size, seconds=5 * seconds * len(sides), **jobs)
    found = found if isinstance(found, dict) else {"simulated": found}  # each against ours
    what = f"{name}, {world_size} ranks, {MICROBATCHES} micro-batches"
    aims = {"simulated": EFFICIENCY_AIMS[world_size], "torch": 1.0}
    for side, ratio in found.items():
        against = f"PyTorch's {TORCH[name]}" if side == "torch" else "simulated"
        lines.append(Line(what, against, ratio.ratio, ratio.low, ratio.high, aims[side]))
