"""Every lab, a test for each group of variants. ``perflab run`` starts this file in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import pytest

from bench import environment
from bench.journal import Journal
from bench.measure import GroupResult, explain, measure_group
from bench.plan import Plan
from bench.plugin import USED, register
from bench.world.steps import Worlds
from labs import NAMES, load
from labs import calibration_anchors as anchors
from labs.lab import Lab, Prediction, Scale, configure
from labs.machine import Machine, load_cached


def _plan(config: pytest.Config) -> Plan:
    path = config.getoption("--perflab-plan")
    if path:
        return Plan.read(path)
    scale: Scale = config.getoption("perflab_scale") or "normal"
    return Plan({name: asdict(configure(load(name), scale)) for name in NAMES}, scale)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = _plan(metafunc.config).groups(environment.allocator_mode())
    metafunc.parametrize(("lab_name", "group"), groups, ids=[f"{lab}/{group}" for lab, group in groups])


@pytest.fixture(scope="session")
def plan(pytestconfig: pytest.Config) -> Plan:
    plan = _plan(pytestconfig)
    pytestconfig.stash[USED] = True
    if plan.journal and not any(event["event"] == "session" for event in Journal(plan.journal).events()):
        hook = pytestconfig.hook
        machine_info = hook.pytest_benchmark_generate_machine_info(config=pytestconfig)
        hook.pytest_benchmark_update_machine_info(config=pytestconfig, machine_info=machine_info)
        Journal(plan.journal).write(
            "session",
            machine_info=machine_info,
            commit_info=hook.pytest_benchmark_generate_commit_info(config=pytestconfig),
            version=metadata.version("pytest-benchmark"),
        )
    return plan


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    kept = Worlds()
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def machine() -> Machine:
    from labs.calibration import current

    return (load_cached() or current()[0]).with_allocator(environment.allocator_mode())


def test_lab(
    lab_name: str,
    group: str,
    benchmark: Any,
    plan: Plan,
    worlds: Worlds,
    machine: Machine,
) -> None:
    lab, column = load(lab_name), environment.allocator_mode()
    config = plan.config(lab)
    journal = Journal(plan.journal) if plan.journal else None

    def report(event: str, **content: Any) -> None:
        if journal is not None:
            journal.write(event, lab=lab_name, group=group, column=column, **content)

    _check_speed(lab, config, machine, journal)
    started = time.perf_counter()
    predictions: dict[str, list[Prediction]] = {}
    for prediction in _predictions(lab, config, machine, journal):
        predictions.setdefault(prediction.variant, []).append(prediction)
    report("started")
    try:
        result = measure_group(
            lab,
            config,
            group,
            budget_seconds=plan.budget_seconds(lab, group),
            machine=machine,
            predictions=predictions,
            worlds=worlds,
            on_phase=lambda phase: report("phase", phase=phase),
        )
    except Exception as error:
        report("error", variant="", error=explain(error))
        report("group", complete=False, seconds=time.perf_counter() - started)
        raise
    benchmark.group = f"{lab_name}/{group}"
    benchmark._mode = "labs"
    for measured in result.measured:
        name = f"{measured.variant.name}/{column}"
        timed = measured.timed
        entry = register(
            benchmark, name, timed.seconds, timed.iterations, measured.extra_info, benchmark.group
        )
        report("variant", variant=measured.variant.address, benchmark=entry.as_dict())
    problems = _report_group(result, report)
    report("group", complete=not result.errors, seconds=time.perf_counter() - started)
    assert not problems, "; ".join(problems)


def _check_speed(lab: Lab, config: Any, machine: Machine, journal: Journal | None) -> None:
    """Before a lab's first group: whether the machine still runs as it was calibrated. Where
    it does not, what is predicted is written down anew, before anything of the lab is timed. The last event
    says that this is done: without it, a run that goes on checks again."""
    if journal is None:
        return
    column = machine.allocator
    events = [e for e in journal.events() if e.get("lab") == lab.name and e.get("column") == column]
    if any(event["event"] in ("speed", "variant") for event in events):
        return  # checked, or a part of it is measured already, by what was predicted then
    journal.write("phase", lab=lab.name, column=column, group="", phase="checking the machine's speed")
    try:
        asked = anchors.asked_of(machine, lambda asked: lab.predict(config, asked))
        found = anchors.speeds(machine, asked)
        now = lab.predict(config, anchors.at_speeds(machine, found)) if found else ()
        predictions = [asdict(each) for each in now]
    except Exception as error:  # what was predicted at first stands
        journal.write("speed", lab=lab.name, column=column, speeds={}, error=explain(error))
        return
    if found:
        journal.write("predictions", lab=lab.name, column=column, predictions=predictions)
    journal.write("speed", lab=lab.name, column=column, speeds=found)


def _predictions(lab: Lab, config: Any, machine: Machine, journal: Journal | None) -> list[Prediction]:
    """The run's predictions as they were written down; without a run, the lab's."""
    if journal is None:
        return list(lab.predict(config, machine))
    written = (event for event in journal.events() if event["event"] == "predictions")
    mine = [e for e in written if e["lab"] == lab.name and e["column"] == machine.allocator]
    return [Prediction(**item) for item in mine[-1]["predictions"]] if mine else []


def _report_group(result: GroupResult, report: Any) -> list[str]:
    """Write the group's proofs and faults to the journal; what went wrong, one line each."""
    for check in result.checks:
        report("check", check=asdict(check) | {"passed": check.passed})
    for address, reason in result.unavailable.items():
        report("unavailable", variant=address, reason=reason)
    for address, error in result.errors.items():
        report("error", variant=address, error=error)
    problems = [f"{address}: {error}" for address, error in result.errors.items()]
    for check in result.checks:
        if not check.passed:
            error = f"error {check.error:.3g}, allowed {check.tolerance:.3g}"
            problems.append(f"{check.variant} differs from {check.against}: {error}")
    return problems
