"""Reading and analysing traces beside HolisticTraceAnalysis and TraceLens, each in a whole process.

    PERFLAB_TRACE_PEERS=/path/to/bin/python pytest bench/suites/test_traces.py [--quick]

The variable names the interpreter of an environment that has the peers: ``pip install traceinsight
"pandas<3"`` (HolisticTraceAnalysis; newer pandas breaks it) and TraceLens from its repository. A peer that is
not there is skipped. Traces are those of ``../shared/traces`` with 100,000 events and more, and one of them
repeated to 250,000 and to a million events (a quick run leaves these to us alone).

CPU seconds and peak memory are the whole child's, imports included; runs alternate and the least of each side
counts. numpy's BLAS gets one thread on both sides: its pool costs 50 ms at import and serves neither.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.suites.lines import gathered

TRACES = Path(__file__).parents[3] / "shared" / "traces"
PEERS = {"hta": ("HolisticTraceAnalysis", "hta"), "tracelens": ("TraceLens", "TraceLens")}
AIMS = {"hta": (10.0, 2.0), "tracelens": (20.0, 1.0)}
"""How many times less CPU and memory than the peer."""
MILLION_SECONDS = 4.0
_LARGE = ("hta_trace_diff_control_a100_rank3of8.json.gz", "hta_trace_diff_test_v100_rank1of2.json.gz")


@dataclass(frozen=True)
class Cost:
    """Of a whole process."""

    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Line:
    trace: str
    peer: str
    ours: Cost
    theirs: Cost
    aim: tuple[float, float]

    @property
    def ratios(self) -> tuple[float, float]:
        return self.theirs.cpu_s / self.ours.cpu_s, self.theirs.peak_mb / self.ours.peak_mb


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[Line]:
    return gathered(pytestconfig, render)


def render(lines: list[Line], width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="load and analysis of a trace, whole processes")
    for heading in ("trace", "peer", "CPU s", "its CPU s", "less", "aim", "MB", "its MB", "less", "aim"):
        table.add_column(heading, justify="left" if heading in ("trace", "peer") else "right")
    for line in lines:
        cells = []
        for ours, theirs, ratio, aim, form in zip(
            (line.ours.cpu_s, line.ours.peak_mb),
            (line.theirs.cpu_s, line.theirs.peak_mb),
            line.ratios,
            line.aim,
            (".2f", ".0f"),
            strict=True,
        ):
            verdict = "met" if ratio >= aim else "missed"
            cells += [f"{ours:{form}}", f"{theirs:{form}}", f"{ratio:.1f}x", f"{aim:g}x {verdict}"]
        table.add_row(line.trace, line.peer, *cells)
    text = io.StringIO()
    Console(file=text, width=max(width, 120)).print(table)
    return text.getvalue()


def cost(interpreter: str, way: str, trace: Path) -> Cost:
    """One run in a process of its own. Failing is an error of the caller."""
    script = Path(__file__).with_name("trace_peers.py")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if interpreter == sys.executable:
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [interpreter, str(script), way, str(trace)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        printed = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{way} failed on {trace.name} (status {process.returncode})")
    return Cost(usage.ru_utime + usage.ru_stime, float(printed[-1]))


def peer_interpreter(peer: str) -> str:
    name, module = PEERS[peer]
    interpreter = os.environ.get("PERFLAB_TRACE_PEERS", sys.executable)
    found = subprocess.run(
        [interpreter, "-c", f"import {module}"], capture_output=True, timeout=120, check=False
    )
    if found.returncode:
        pytest.skip(f"{name} is not installed in {interpreter} (see PERFLAB_TRACE_PEERS)")
    return interpreter


def repeated(source: Path, events: int, path: Path) -> Path:
    """The trace again and again, later each time, with correlations and steps of their own."""
    document = json.loads(gzip.decompress(source.read_bytes()))
    once = [event for event in document["traceEvents"] if event["ph"] != "M"]
    labels = [event for event in document["traceEvents"] if event["ph"] == "M"]
    first = min(event["ts"] for event in once)
    span = max(event["ts"] + event.get("dur", 0) for event in once) - first + 10
    found: list[dict[str, Any]] = list(labels)
    for index in range(events):
        turn, place = divmod(index, len(once))
        event = dict(once[place], ts=once[place]["ts"] + turn * span)
        arguments = event.get("args", {})
        if "correlation" in arguments:
            event["args"] = arguments | {"correlation": arguments["correlation"] + turn * 10_000_000}
        if event["name"].startswith("ProfilerStep#"):
            event["name"] = f"ProfilerStep#{int(event['name'].split('#')[1]) + 1000 * turn}"
        found.append(event)
    document["traceEvents"] = found
    with gzip.open(path, "wt", compresslevel=1) as file:
        json.dump(document, file)
    return path


def trace_of(name: str, folder: Path) -> Path:
    if not TRACES.exists():
        pytest.skip(f"the real traces are not there ({TRACES.name} beside the project, in shared)")
    if name.isdigit():
        return repeated(TRACES / _LARGE[0], int(name), folder / f"{name}.json.gz")
    return TRACES / name


def quick(config: pytest.Config) -> bool:
    return bool(config.getoption("perflab_scale") == "quick")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", [*_LARGE, "250000", "1000000"])
def test_less_cpu_and_memory_than(
    peer: str, name: str, lines: list[Line], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if quick(pytestconfig) and name.isdigit():
        pytest.skip("a quick run has only real traces")
    interpreter, trace = peer_interpreter(peer), trace_of(name, tmp_path)
    runs = 2 if quick(pytestconfig) or name.isdigit() else 3
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(cost(sys.executable, "ours", trace))
        try:
            theirs.append(cost(interpreter, peer, trace))
        except RuntimeError as error:
            pytest.skip(str(error))
    least = [Cost(min(c.cpu_s for c in costs), min(c.peak_mb for c in costs)) for costs in (ours, theirs)]
    line = Line(trace.name, PEERS[peer][0], least[0], least[1], AIMS[peer])
    lines.append(line)
    assert min(line.ratios) > 1, "slower or larger than the peer"


def test_a_million_events_in_under_four_seconds_of_cpu(tmp_path: Path) -> None:
    trace = trace_of("1000000", tmp_path)
    best = min(cost(sys.executable, "ours", trace).cpu_s for _ in range(3))
    assert best < MILLION_SECONDS, f"{best:.2f} s"
    print(f"a million events: {best:.2f} s of CPU")
