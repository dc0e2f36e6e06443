"""Known deadlocks, each in a process group of its own that is ended after a time limit.

``python -m labs.concurrency.hazards`` runs them all at once and prints what happened. None of these is a
fault of the reader's machine: fork copies the calling thread only, so a lock or a thread pool that lived
in another thread is dead in the child; and numba's workqueue layer is not made for two callers.

Sources: numba documentation, "The Threading Layers"; JAX's own warning at os.fork; CPython documentation
of multiprocessing, "Contexts and start methods"; PyTorch documentation, "Multiprocessing best practices".
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from labs.lab import Recorder, Step, Variant

IMPORT_S = 90.0  # until a scenario says that it is ready: imports and compiling, on a busy machine
READY = b"ready\n"


@dataclass(frozen=True)
class Scenario:
    """A program that prints READY, then does the dangerous thing, then ends.

    program: runs with ``die_with_parent`` imported and called; a forked child calls it again, so that
        not even ``kill -9`` of the runner leaves a hung process.

    expected: ``hung`` or ``died``, where the library still has the weakness.
    """

    name: str
    what: str
    expected: str
    advice: str
    modules: tuple[str, ...]
    program: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Hazard:
    """What happened. outcome: ``finished``, ``hung, ended after X s``, ``died with ...`` or ``not run: ...``.

    seconds: from READY to the end.
    """

    name: str
    what: str
    expected: str
    outcome: str
    seconds: float
    advice: str

    @property
    def verdict(self) -> str:
        """``hung``, ``died``, ``finished`` or ``not run``."""
        return "not run" if self.outcome.startswith("not run") else self.outcome.split(",")[0].split(" ")[0]


_FORK = """
import os
print("ready", flush=True)
child = os.fork()
if child == 0:
    die_with_parent()
    {use}
    os._exit(0)
_, status = os.waitpid(child, 0)
code = os.waitstatus_to_exitcode(status)
if code < 0:
    import signal
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
_TWO_THREADS = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2", "JAX_PLATFORMS": "cpu"}
_SUM = """
import threading
import numpy as np
from numba import njit, prange
@njit(parallel=True)
def total(x):
    found = 0.0
    for i in prange(x.size):
        found += x[i] * x[i]
    return found
x = np.random.rand(1_000_000)
total(x)
"""

SCENARIOS = (
    Scenario(
        "fork_after_torch_openmp",
        "torch ran an operation on several threads; a forked child runs one",
        "hung",
        "start workers with spawn or forkserver, or fork before torch's first parallel operation",
        ("torch",),
        "import torch\ntorch.set_num_threads(2)\nx = torch.rand(1_000_000)\nx.exp().sum().item()\n"
        + _FORK.format(use="x.exp().sum().item()"),
        _TWO_THREADS,
    ),
    Scenario(
        "fork_after_jax",
        "JAX ran a computation; a forked child runs one",
        "hung",
        "start workers with spawn or forkserver, or use NumPy only in forked children",
        ("jax",),
        "import warnings\nwarnings.simplefilter('ignore')\nimport jax, jax.numpy as jnp\n"
        "f = jax.jit(lambda a: (a @ a).sum())\nx = jnp.ones((500, 500))\nf(x).block_until_ready()\n"
        + _FORK.format(use="f(x + 1).block_until_ready()"),
        _TWO_THREADS,
    ),
    Scenario(
        "numba_workqueue_two_threads",
        "two Python threads call a parallel numba function under the workqueue layer",
        "died",
        "NUMBA_THREADING_LAYER=omp or tbb, or one caller at a time",
        ("numba",),
        _SUM
        + """
def often():
    for _ in range(200):
        total(x)
print("ready", flush=True)
callers = [threading.Thread(target=often) for _ in range(2)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
""",
        {**_TWO_THREADS, "NUMBA_THREADING_LAYER": "workqueue"},
    ),
    Scenario(
        "fork_after_numba_openmp",
        "numba ran a parallel function under its OpenMP layer; a forked child runs one",
        "died",
        "start workers with spawn or forkserver, or NUMBA_THREADING_LAYER=workqueue or tbb",
        ("numba",),
        _SUM + _FORK.format(use="total(x)"),
        {**_TWO_THREADS, "NUMBA_THREADING_LAYER": "omp"},
    ),
)


class _Run:
    """One scenario in its own session, so that it can be ended with everything it started."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.begin = time.monotonic()
        self.ready = 0.0
        self.end = 0.0
        self.killed = False
        self.output = b""
        program = (
            "from labs.concurrency.workers import die_with_parent\ndie_with_parent()\n" + scenario.program
        )
        paths = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **scenario.environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )

    def deadline(self, timeout: float) -> float:
        return self.ready + timeout if self.ready else self.begin + IMPORT_S

    def read(self, selector: selectors.BaseSelector) -> None:
        """Notes READY; then the output is of no more interest."""
        output = self.process.stdout
        if self.ready or output is None:
            return
        os.set_blocking(output.fileno(), False)
        with suppress(BlockingIOError):
            part = os.read(output.fileno(), 4096)  # READY may come in pieces
            self.output += part
            if not part:  # closed without READY: no more to read, and it would wake the selector forever
                with suppress(KeyError):
                    selector.unregister(output)
        if READY in self.output:
            self.ready = time.monotonic()
            selector.unregister(output)

    def kill(self) -> None:
        """Ends the whole group; also a child that outlived its parent."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def hazard(self) -> Hazard:
        scenario, code = self.scenario, self.process.returncode
        seconds = self.end - (self.ready or self.begin)
        if not self.ready:
            outcome = f"not run: no ready message within {seconds:.0f} s (exit code {code})"
        elif self.killed:
            outcome = f"hung, ended after {seconds:.1f} s"
        elif code < 0:
            outcome = f"died with signal {signal.Signals(-code).name}"
        else:
            outcome = "finished" if code == 0 else f"died with exit code {code}"
        return Hazard(scenario.name, scenario.what, scenario.expected, outcome, seconds, scenario.advice)


def run_hazards(timeout: float = 5.0, scenarios: Sequence[Scenario] = SCENARIOS) -> list[Hazard]:
    """Runs the scenarios side by side (they mostly wait) and says what happened to each.

    timeout: seconds from a scenario's READY until it counts as hung and its process group is killed.
    A scenario whose library is not installed is not run. Nothing is left running, whatever happens.
    """
    if not timeout > 0:
        raise ValueError(f"the time limit of a hazard is {timeout} s; it must be above 0")
    runs: dict[str, _Run] = {}
    missing: dict[str, str] = {}
    try:
        with selectors.DefaultSelector() as selector:
            for scenario in scenarios:
                lacking = _lacking(scenario)
                if lacking:
                    missing[scenario.name] = lacking
                    continue
                runs[scenario.name] = run = _Run(scenario)
                selector.register(run.process.stdout, selectors.EVENT_READ, run)  # type: ignore[arg-type]
            open_runs = list(runs.values())
            while open_runs:
                now = time.monotonic()
                late = min(run.deadline(timeout) for run in open_runs)
                # A forked child keeps its parent's output open, so the end of file is no sign of the end.
                selector.select(min(0.05, max(0.0, late - now)))
                for run in list(open_runs):
                    ended = run.process.poll() is not None  # asked before reading: READY came before the end
                    run.read(selector)
                    now = time.monotonic()
                    if ended or now > run.deadline(timeout):
                        run.end, run.killed = now, not ended
                        open_runs.remove(run)
                        with suppress(KeyError, ValueError):
                            selector.unregister(run.process.stdout)  # type: ignore[arg-type]
                        run.kill()
    finally:
        for run in runs.values():
            run.kill()
    return [
        runs[each.name].hazard()
        if each.name in runs
        else Hazard(each.name, each.what, each.expected, f"not run: {missing[each.name]}", 0.0, each.advice)
        for each in scenarios
    ]


def _lacking(scenario: Scenario) -> str:
    if not hasattr(os, "fork"):
        return "this system has no fork"
    absent = [module for module in scenario.modules if importlib.util.find_spec(module) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""


# --- as a part of the lab ------------------------------------------------------------------------

VARIANT = "hazards/all_side_by_side"


def _setup(config: Any, recorder: Recorder) -> Step:
    from labs.concurrency import cluster

    cluster.shut_down()  # this group comes last: nothing uses it any more, and it would keep a core busy

    def step() -> object:
        found = run_hazards(config.hazard_s)
        for hazard in found:
            recorder.record(f"{hazard.name}_seconds", hazard.seconds, "s")
            for verdict in ("hung", "died", "finished"):
                recorder.record(f"{hazard.name}_{verdict}", float(hazard.verdict == verdict), "")
        return found

    return step


def variants(config: Any) -> Sequence[Variant]:
    """One variant: the outcomes are what it records, and running all at once saves the reader's time."""
    group, name = VARIANT.split("/")
    setup: Callable[[Any, Recorder], Step] = _setup
    return [Variant(group, name, setup, threads=0, max_rounds=1)]


def main() -> None:
    """Prints each hazard's outcome; the exit status is 0: what is shown here is no failure."""
    for hazard in run_hazards():
        print(f"{hazard.name}: {hazard.what}")
        print(f"  {hazard.outcome} (expected: {hazard.expected})\n  instead: {hazard.advice}")


if __name__ == "__main__":
    main()
