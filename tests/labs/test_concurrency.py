"""The concurrency lab: every way computes the same, the model is its formula, nothing is left running."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import labs
from labs.concurrency import cluster, compute, hazards, model, pools, sweeps, timeline, workers
from labs.concurrency.config import PAYLOAD_ITERATIONS, PAYLOAD_SWEEP, TASK_SWEEP, Config
from labs.figure import Span
from labs.lab import Interval, NotMeasured, Prediction, Recorder, Variant, configure
from labs.machine import Curve, Machine

ROOT = Path(__file__).parents[2]
SMALL = Config(
    workers=2, tasks=3, iterations=1_000, elements=700, waits=3, many_waits=7, wait_s=0.001, tiny_tasks=20,
    payload_MiB=1, hazard_s=1.0,
)  # fmt: skip
CONSTANTS = {
    "cores": 2.0, "python_operation_s": 1e-8, "python_call_s": 2e-8, "process_switch_s": 1e-5,
    "thread_switch_s": 5e-6, "pickle_s_per_byte": 1e-9, "pipe_s_per_byte": 2e-9, "pickle_item_s": 3e-8,
    "fork_s": 2e-3, "forkserver_s": 2e-2, "spawn_s": 5e-2, "thread_start_s": 6e-5, "numpy_call_s": 1e-6,
    "fma_latency_s": 1e-9,
}  # fmt: skip
CURVE = Curve([1e4, 1e9], [1e10, 1e10])
MACHINE = Machine("made up", True, CONSTANTS, {"copy_1": CURVE, "copy_all": CURVE})


class Notes:
    """A Recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def now(self) -> float:
        return time.perf_counter()

    def record(self, name: str, value: float, unit: str) -> None:
        self.values.setdefault(name, []).append(value)


def run_group(config: Config, variants: list[Variant]) -> tuple[dict[str, object], dict[str, Notes]]:
    """The second output of each variant (its first is the cold call) and what it recorded."""
    outputs: dict[str, object] = {}
    notes = {variant.address: Notes() for variant in variants}
    steps = {}
    try:
        for variant in variants:
            recorder: Recorder = notes[variant.address]
            steps[variant.address] = variant.setup(config, recorder)
        for address, step in steps.items():
            step()
            outputs[address] = step()
    finally:
        for step in steps.values():
            if hasattr(step, "close"):
                step.close()
    return outputs, notes


def group(config: Config, name: str) -> list[Variant]:
    found = [
        variant
        for variant in labs.load("concurrency").variants(config)
        if variant.group == name
        and variant.name != "ray"
        and variant.processes == 1
        and not variant.unavailable
    ]
    assert found
    return found


COMPUTED = (
    "python_work", "numpy_work", "numba_work", "waiting", "many_waits", "start_up", "per_task", "transfer",
    "combine", "crossover_task", "crossover_payload", timeline.GROUP,
)  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_every_way_computes_the_same(name: str) -> None:
    lab = labs.load("concurrency")
    variants = group(SMALL, name)
    outputs, _ = run_group(SMALL, variants)
    checks = lab.check(SMALL, outputs)
    assert [check.variant for check in checks] == [variant.address for variant in variants]
    assert [check for check in checks if not check.passed] == []
    # And the check can say no: each output spoiled in turn.
    for address, output in outputs.items():
        (spoiled,) = lab.check(SMALL, {address: _spoiled(output)})
        assert not spoiled.passed, address


def _spoiled(output: object) -> object:
    """One item of many changed, by as little as shows."""
    if isinstance(output, int):
        return output + 1
    if isinstance(output, list):
        last = output[-1]
        if isinstance(last, tuple):
            value, array = last
            changed = array.copy()
            changed[-1] += 1e-9
            return [*output[:-1], (value, changed)]
        return [*output[:-1], math.nextafter(last, math.inf) if isinstance(last, float) else last + 1]
    changed = output.copy()  # type: ignore[attr-defined]
    changed[len(changed) // 2] += 1e-3
    return changed


def test_pools_and_shared_memory_are_gone_after_close() -> None:
    before = set(_children())
    segments = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    run_group(SMALL, group(SMALL, "transfer"))
    run_group(SMALL, group(SMALL, "start_up"))
    assert pools._pools == {}
    assert set(_children()) - before == set()
    if segments or os.path.isdir("/dev/shm"):
        assert {name for name in set(os.listdir("/dev/shm")) - segments if name.startswith("psm_")} == set()


def _children() -> list[str]:
    """Live processes below this one; the fork server and the resource tracker stay as long as it does."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            kept = process.ppid() == os.getpid() and ("forkserver" in words or "resource_tracker" in words)
            if process.status() != psutil.STATUS_ZOMBIE and not kept:
                found.append(f"{process.pid} {words}")
        except psutil.Error:
            continue
    return found


KILLED = """
import sys, time
from labs.concurrency import pools
pool = pools.process_pool(2, {method!r})
launcher = pools.Launcher()
launcher.start_and_stop("fork", 2)
import psutil
family = [child.pid for child in psutil.Process().children(recursive=True)]
print(*family, flush=True)
pool.executor.submit(time.sleep, 60)
time.sleep(60)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_die_with_a_killed_parent(method: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(method=method)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        family = [int(pid) for pid in output.readline().split()]
        assert len(family) >= 3  # two workers and the launcher
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        end = time.monotonic() + 10
        while any(_runs(pid) for pid in family) and time.monotonic() < end:
            time.sleep(0.05)
        assert [pid for pid in family if _runs(pid)] == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_wait_that_does_not_end_says_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.process_pool(2)
    try:
        monkeypatch.setattr(pools, "PATIENCE_S", 0.5)
        with pytest.raises(TimeoutError, match=r"0.5 s for a pool of 2 processes \(forkserver\)"):
            pool.run(workers.wait, [(0.001,), (30.0,)])
    finally:
        monkeypatch.undo()
        pool.close()
    assert pools._pools == {}


def test_fork_is_refused_where_it_could_deadlock() -> None:
    with pytest.raises(ValueError, match="use a Launcher"):
        pools.process_pool(2, "fork")


def test_a_worker_does_not_import_the_program_that_started_it(tmp_path: Path) -> None:
    program = tmp_path / "heavy.py"
    program.write_text(
        "import sys\nprint('imported', __name__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    from labs.concurrency import pools\n"
        "    pool = pools.process_pool(1, 'spawn')\n    pool.close()\n"
        "    print(sys.modules['__main__'].__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout.splitlines() == ["imported __main__", str(program)], done.stderr


def test_importing_the_lab_loads_nothing_heavy() -> None:
    program = (
        "import sys, labs\nlab = labs.load('concurrency')\n"
        "from labs.lab import configure\nlab.variants(configure(lab))\n"
        "print(sorted({'numpy', 'torch', 'jax', 'numba', 'ray', 'matplotlib', 'psutil'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


# --- the model -----------------------------------------------------------------------------------


def predictions(machine: Machine = MACHINE, config: Config = SMALL) -> dict[tuple[str, str], Prediction]:
    return {(each.variant, each.key): each for each in model.predict(config, machine)}


def test_predictions_are_about_variants_that_exist() -> None:
    addresses = {variant.address for variant in labs.load("concurrency").variants(SMALL)}
    found = predictions()
    times = [key for key in found if key[1] == "time_s"]
    assert len(times) >= 8
    assert {variant for variant, _ in times} <= addresses
    assert all(each.value > 0 and each.because for each in found.values())
    assert {("", "crossover_task_s"), ("", "crossover_payload_B")} <= set(found)


def test_python_work_by_hand() -> None:
    found = predictions()
    task = 1_000 * 5 * 1e-8
    assert found["python_work/serial", "time_s"].value == pytest.approx(3 * task)
    thread = 610 * 1e-8 + 60 * 2e-8
    assert found["python_work/threads", "time_s"].value == pytest.approx(3 * (task + thread))
    process = 2940 * 1e-8 + 260 * 2e-8 + 3 * 1e-5 + 2 * 5e-6 + (480 * 1e-8 + 45 * 2e-8) / 2
    assert found["python_work/processes", "time_s"].value == pytest.approx(2 * task + 3 * process)
    assert found["", "crossover_task_s"].value == pytest.approx(2 * (process - thread))
    length = 5e-8 * PAYLOAD_ITERATIONS
    assert found["", "crossover_payload_B"].value == pytest.approx(
        (length / 2 - process + thread) / (2 * 3e-9)
    )


def test_the_crossover_is_where_the_two_predictions_meet() -> None:
    costs = model.Costs.of(SMALL, MACHINE)
    length, n = model.crossover_task_s(costs), 100
    assert n * (length + costs.thread_task) == pytest.approx(n * (length / 2 + costs.process_task))
    size = model.crossover_payload_B(costs, 1e-2)
    processes = 1e-2 / 2 + costs.process_task + 2 * size * costs.byte
    assert 1e-2 + costs.thread_task == pytest.approx(processes)


def test_more_cores_help_processes_and_not_threads() -> None:
    wide = replace(MACHINE, constants={**CONSTANTS, "cores": 8.0})
    config = replace(SMALL, workers=8, tasks=8)
    two, eight = predictions(MACHINE, config), predictions(wide, config)
    key = ("python_work/processes", "time_s")
    assert eight[key].value < two[key].value
    assert eight["python_work/threads", "time_s"].value == two["python_work/threads", "time_s"].value


def test_a_machine_with_one_core_or_no_constants_gets_fewer_predictions() -> None:
    one = predictions(replace(MACHINE, constants={**CONSTANTS, "cores": 1.0}))
    assert ("", "crossover_task_s") not in one
    assert ("python_work/threads", "time_s") in one
    assert predictions(Machine("sheet", False, {"cores": 64.0})) == {}


def test_a_fresh_large_result_costs_page_faults_in_the_default_column_only() -> None:
    machine = replace(MACHINE, constants={**CONSTANTS, "page_fault_s_per_byte": 1e-9})
    config = replace(SMALL, payload_MiB=64)
    default = predictions(machine, config)["transfer/serial", "time_s"].value
    tuned = predictions(machine.with_allocator("tuned"), config)["transfer/serial", "time_s"].value
    assert default - tuned == pytest.approx(64 * 2**20 * 1e-9)


# --- crossings, timelines, settings --------------------------------------------------------------


def test_a_crossing_is_found_between_points() -> None:
    assert sweeps.crossing([1, 4], [2.0, 0.5]) == pytest.approx(2.0)
    assert sweeps.crossing([1, 10, 100], [10.0, 1.0, 0.1]) == pytest.approx(10.0)
    assert sweeps.crossing([1, 10, 100], [0.25, 0.5, 2.0]) == pytest.approx(10 * 10**0.5)
    assert sweeps.crossing([1, 10], [2.0, 3.0]) is None


def test_a_crossing_has_the_interval_of_its_ratios() -> None:
    falling = [Interval(4, 3, 5), Interval(1, 0.9, 1.1), Interval(0.25, 0.2, 0.3)]
    found = sweeps._between([1, 10, 100], falling)
    assert found is not None
    assert found.value == pytest.approx(10)
    assert 1 < found.low < 10 < found.high < 100
    # A bound that never crosses leaves that side open, to the sweep's end.
    open_side = sweeps._between(
        [1, 10, 100], [Interval(4, 3, 5), Interval(2, 1.5, 3), Interval(0.5, 0.2, 1.5)]
    )
    assert open_side is not None
    assert open_side.high == 100
    assert open_side.low > 1
    rising = sweeps._between([1, 10], [Interval(0.5, 0.4, 1.2), Interval(2, 1.6, 3)])
    assert rising is not None
    assert rising.low == 1
    assert rising.value < rising.high < 10


def test_overlap_is_the_share_of_busy_time_with_two_running() -> None:
    assert timeline.overlap([[Span(0, 1)], [Span(1, 2)]]) == 0
    assert timeline.overlap([[Span(0, 2)], [Span(0, 2)]]) == 1
    assert timeline.overlap([[Span(0, 2), Span(5, 6)], [Span(1, 3)]]) == pytest.approx(1 / 4)
    assert math.isnan(timeline.overlap([[], []]))


class Recorded:
    """Just enough of Results for ``spans``."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def recorded(self, variant: str, name: str) -> list[float]:
        if name not in self.notes.values:  # as of real results: of workers that there were not
            raise NotMeasured(f"{variant} recorded no {name!r}")
        return self.notes.values[name]


def test_a_piece_that_waited_leaves_a_gap() -> None:
    notes = Notes()
    for begin, end in ((10.0, 10.1), (10.1, 10.2), (10.2, 10.7), (10.7, 10.8)):
        notes.record("worker0_begin", begin, "s")
        notes.record("worker0_end", end, "s")
    (row,) = timeline.spans(Recorded(notes), "any")  # type: ignore[arg-type]
    assert [(round(span.begin, 6), round(span.end, 6)) for span in row] == [(0.0, 0.2), (0.7, 0.8)]


def test_workers_note_when_they_ran() -> None:
    variants = group(SMALL, timeline.GROUP)
    _, notes = run_group(SMALL, variants)
    for variant in variants:
        values = notes[variant.address].values
        for worker in range(2):
            begins, ends = values[f"worker{worker}_begin"], values[f"worker{worker}_end"]
            assert len(begins) == len(ends) == 2 * timeline.PIECES  # of both calls
            assert all(begin <= end for begin, end in zip(begins, ends, strict=True))
        # One clock for all processes: what they noted lies within the step.
        assert abs(values["worker0_begin"][-1] - time.perf_counter()) < 60


def test_settings_are_bounded() -> None:
    lab = labs.load("concurrency")
    assert configure(lab, "quick").iterations < configure(lab, "full").iterations
    for name, value in (
        ("workers", "65"),
        ("workers", "-1"),
        ("tasks", "0"),
        ("wait_s", "0"),
        ("payload_MiB", "0"),
    ):
        with pytest.raises(ValueError, match=name):
            configure(lab, "quick", {name: value})
    assert lab.memory_bytes(replace(SMALL, payload_MiB=64)) > lab.memory_bytes(SMALL)


def test_hazards_come_last_and_run_once() -> None:
    last = labs.load("concurrency").variants(SMALL)[-1]
    assert last.address == hazards.VARIANT
    assert last.max_rounds == 1
    assert all(size > 0 for size in (*TASK_SWEEP, *PAYLOAD_SWEEP))


# --- Ray -----------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.skipif(bool(cluster.unavailable()), reason="Ray is not installed")
def test_ray_computes_the_same_and_leaves_nothing() -> None:
    lab = labs.load("concurrency")
    variants = [variant for variant in lab.variants(SMALL) if variant.name == "ray" or variant.group == "ray"]
    assert len(variants) >= 4
    before = set(_children())
    try:
        outputs, notes = run_group(SMALL, variants)
        folder = cluster._cluster[0].folder.name
        assert os.path.isdir(folder)
        assert all(note.values["start_s"][-1] > 0 for note in notes.values() if note.values)
    finally:
        cluster.shut_down()
    checks = lab.check(SMALL, outputs)
    assert len(checks) == len(variants)
    assert [check for check in checks if not check.passed] == []
    assert not os.path.exists(folder)
    end = time.monotonic() + 10
    while set(_children()) - before and time.monotonic() < end:
        time.sleep(0.1)
    assert set(_children()) - before == set()


RAY_KILLED = """
import os, time
from labs.concurrency import cluster
class Notes:
    now = staticmethod(time.perf_counter)
import psutil
ray = cluster.cluster(1, Notes())
print(ray.folder.name, *[each.pid for each in psutil.Process().children(recursive=True)], flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.skipif(bool(cluster.unavailable()), reason="Ray is not installed")
def test_a_killed_owner_leaves_no_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAY_KILLED], capture_output=True, text=True, timeout=90, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, *pids = done.stdout.split()
    assert len(pids) >= 3
    end = time.monotonic() + 10
    while (any(_runs(int(pid)) for pid in pids) or os.path.exists(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [pid for pid in pids if _runs(int(pid))] == []
    assert not os.path.exists(folder)


def test_the_reference_refuses_an_unknown_group() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        compute.arguments(SMALL, "nowhere")
