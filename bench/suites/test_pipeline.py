"""``parallel.pipeline`` beside PyTorch's pipelining and beside the simulator, on virtual devices.

    pytest bench/suites/test_pipeline.py [--quick]

Both run in the same rounds of one world of processes, whose stages sleep (``parallel.virtual``): what is
compared is order and overhead, not speed of computing. Two lines a schedule: ours against PyTorch's
counterpart, and the simulated step (set unit times, no latency, no overhead) over the measured one, which is
realised efficiency divided by that of the schedule. A quick run leaves out 8 ranks.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest

from bench.plugin import TABLES, Paired
from bench.suites.pipeline_jobs import TORCH, UNIT
from parallel import schedules

JOBS = "bench.suites.pipeline_jobs"
MICROBATCHES = 8
EFFICIENCY_AIMS = {4: 0.98, 8: 0.95}
"""Of what the simulator says, by the number of ranks, with units of 25 ms."""


@dataclass(frozen=True)
class Line:
    """Something that is to be at least ``aim``, with its 95 % interval."""

    name: str
    against: str
    value: float
    low: float
    high: float
    aim: float

    @property
    def verdict(self) -> str:
        return "met" if self.low >= self.aim else "missed" if self.high < self.aim else "cannot tell"


LINES = pytest.StashKey[list[Line]]()


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[Line]:
    if LINES not in pytestconfig.stash:
        pytestconfig.stash[LINES] = []
        tables = pytestconfig.stash.setdefault(TABLES, [])
        tables.append(lambda width: render(pytestconfig.stash[LINES], width))
    return pytestconfig.stash[LINES]


def render(lines: list[Line], width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"pipelines on virtual devices, units of {UNIT * 1e3:.0f} ms (peer / ours; simulated / measured)"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for heading in ("ours", "against", "ratio", "95 % interval", "aim", ""):
        table.add_column(heading, justify="left" if heading in ("ours", "against", "") else "right")
    for line in lines:
        interval = f"[{line.low:.3f}, {line.high:.3f}]"
        table.add_row(line.name, line.against, f"{line.value:.3f}", interval, f"{line.aim:.2f}", line.verdict)
    text = io.StringIO()
    Console(file=text, width=max(width, 100)).print(table)
    return text.getvalue()


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
