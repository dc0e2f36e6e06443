"""Measure one group of a lab: set up, cold calls, proof, warm-up, interleaved rounds.

This is the only place that times variants. It returns plain dictionaries (``extra_info``) beside the
samples, so that the plugin can hand them to pytest-benchmark and the journal can keep them.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench import environment, stats
from bench.clocks import clock
from bench.profile.group import profiles
from bench.rounds import CpuMeter, Timed, call_cold, pairs, run_rounds, warm_up
from bench.world.steps import WorldClock, Worlds, WorldStep
from labs.lab import Check, Lab, Prediction, Variant
from labs.machine import Machine

LONGEST_TEXT = 20_000  # letters: a report of many labs stays below 2 MB


class RoundRecorder:
    """The Recorder handed to a variant: keeps what setup recorded, the last round's values, and all texts."""

    def __init__(self) -> None:
        from time import perf_counter

        self.now = perf_counter
        self._setup: dict[str, list[float]] = {}
        self._round: dict[str, list[float]] = {}
        self._target = self._setup
        self.texts: dict[str, str] = {}

    def record(self, name: str, value: float, unit: str) -> None:
        key = f"{name}_{unit}" if unit else name
        self._target.setdefault(key, []).append(float(value))

    def text(self, title: str, text: str) -> None:
        left_out = len(text) - LONGEST_TEXT
        self.texts[title] = (
            text if left_out <= 0 else f"{text[:LONGEST_TEXT]}\n... {left_out} more letters are left out"
        )

    def begin_round(self) -> None:
        self._round = self._target = {}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is recorded meanwhile is not kept: a profiled call is no round."""
        kept, self._target = self._target, {}
        try:
            yield
        finally:
            self._target = kept

    @property
    def values(self) -> dict[str, list[float]]:
        return {**self._setup, **self._round}


@dataclass
class Rounds:
    """What one variant recorded in each timed round: the last value of each name.

    recorded: what it has recorded by now. What its setup recorded was measured once, not in every round.
    """

    recorded: Callable[[], Mapping[str, Sequence[float]]]
    values: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._of_setup = set(self.recorded())

    def keep(self) -> None:
        for name, values in self.recorded().items():
            if values and name not in self._of_setup:
                self.values.setdefault(name, []).append(float(values[-1]))


@dataclass
class Measured:
    """One variant's samples and facts."""

    variant: Variant
    timed: Timed
    extra_info: dict[str, Any]


@dataclass
class GroupResult:
    measured: list[Measured] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def explain(error: BaseException) -> str:
    """One line: what went wrong, and where in our code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}{where}"


def measure_group(
    lab: Lab,
    config: Any,
    group: str,
    *,
    budget_seconds: float,
    machine: Machine | None = None,
    predictions: Mapping[str, list[Prediction]] | None = None,
    worlds: Worlds | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> GroupResult:
    """Everything measured about ``lab``'s variants of ``group``. A variant that raises is reported in
    ``errors`` and the others go on."""
    result = GroupResult()
    own = Worlds()  # none is started while the caller's are there
    worlds = worlds or own
    steps: dict[str, Timed] = {}
    facts: dict[str, dict[str, Any]] = {}
    recorders: dict[str, RoundRecorder] = {}
    rounds: dict[str, Rounds] = {}
    variants = {v.address: v for v in lab.variants(config) if v.group == group}

    def failed(address: str, error: Exception) -> None:
        result.errors[address] = explain(error)
        _close(address, steps.pop(address, None), result)

    try:
        for address, variant in variants.items():
            if variant.unavailable:
                result.unavailable[address] = variant.unavailable
                continue
            on_phase(f"{variant.name}: first call")
            recorder = recorders[address] = RoundRecorder()
            meter = CpuMeter()
            try:
                timed = _set_up(lab, config, variant, recorder, worlds)
                steps[address] = timed
                rounds[address] = Rounds(partial(_recorded, timed, recorder))
                timed.after_sample = rounds[address].keep
                recorder.begin_round()
                meter.watch_children()
                cpu = meter.read()
                call_cold(timed)
                facts[address] = {
                    "cold_s": timed.cold_seconds,
                    "cold_cpu_s": meter.read() - cpu,
                }
            except Exception as error:
                failed(address, error)
        on_phase("proof")
        _prove(lab, config, steps, result)
        for address, timed in list(steps.items()):
            on_phase(f"{variants[address].name}: warm-up")
            try:
                warm_up(timed, budget_seconds / len(steps))
                if timed.max_rounds == 1:
                    rounds[address].keep()  # its first call is its round
            except Exception as error:
                failed(address, error)
        on_phase("rounds")
        run_rounds(dict(steps), budget_seconds, on_error=failed, on_sign=on_phase)
        profile = {address: variants[address].profiled for address in steps if variants[address].profiled}
        if profile:
            on_phase("profiles")
            with contextlib.ExitStack() as aside:
                for recorder in recorders.values():
                    aside.enter_context(recorder.aside())
                said, problems = profiles(steps, profile)
            for address, extra in said.items():
                facts[address] |= extra
            result.errors |= problems
    finally:
        for address, timed in steps.items():
            _close(address, timed, result)
        own.close()
    first = next(iter(steps), None)
    for address, timed in steps.items():
        extra = facts[address] | _extra_info(lab, variants[address], timed, recorders[address], machine)
        wanted = (predictions or {}).get(address, [])
        extra["predicted"] = {item.key: item.value for item in wanted}
        extra["measured"] = {"time_s": stats.median_interval(timed.seconds)[0]}
        extra["by_round"] = {}
        for item in wanted:
            values = rounds[address].values.get(item.key, [])
            if values and all(map(math.isfinite, values)):
                extra["by_round"][item.key] = values
                extra["measured"][item.key] = stats.quantity_interval(values)[0]
            elif item.key in extra["recorded"]:
                extra["measured"][item.key] = extra["recorded"][item.key][-1]
        if first is not None and address != first:
            base, new = pairs(steps[first], timed)
            if base:
                extra["against"] = {"base": first, **vars(stats.compare_pairs(base, new))}
        result.measured.append(Measured(variants[address], timed, extra))
    return result


def _set_up(lab: Lab, config: Any, variant: Variant, recorder: RoundRecorder, worlds: Worlds) -> Timed:
    if variant.processes > 1:
        return Timed(worlds.step(lab.name, config, variant), WorldClock(), variant.max_rounds)
    step = variant.setup(config, recorder)
    return Timed(step, clock(variant.clock), variant.max_rounds, recorder.begin_round)


def _recorded(timed: Timed, recorder: RoundRecorder) -> Mapping[str, list[float]]:
    """What a step recorded: in this process, or in rank 0 of its world."""
    return timed.step.recorded if isinstance(timed.step, WorldStep) else recorder.values


def _close(address: str, timed: Timed | None, result: GroupResult) -> None:
    """End a step; what goes wrong there is an error of the variant, if it has no earlier one."""
    close = getattr(timed.step, "close", None) if timed is not None else None
    try:
        if close is not None:
            close()
    except Exception as error:
        result.errors.setdefault(address, f"close: {explain(error)}")


def _prove(lab: Lab, config: Any, steps: Mapping[str, Timed], result: GroupResult) -> None:
    """Hold every output against the lab's reference; then let go of the outputs."""
    try:
        result.checks = list(lab.check(config, {address: timed.output for address, timed in steps.items()}))
    except Exception as error:
        result.errors["check"] = explain(error)
    for timed in steps.values():
        timed.output = None


def _extra_info(
    lab: Lab, variant: Variant, timed: Timed, recorder: RoundRecorder, machine: Machine | None
) -> dict[str, Any]:
    median, low, high = stats.median_interval(timed.seconds)
    cpu = sorted(timed.cpu_seconds)
    extra: dict[str, Any] = {
        "lab": lab.name,
        "variant": variant.address,
        "allocator": environment.allocator_mode(),
        "interval_s": [low, high],
        "cpu_s": cpu[len(cpu) // 2] if cpu else None,
        "load_average_1_min": environment.load_average(),
        "rounds_index": timed.rounds,
        "recorded": _recorded(timed, recorder),
        "texts": timed.step.texts if isinstance(timed.step, WorldStep) else recorder.texts,
        "threads": variant.threads,
        "processes": variant.processes,
    }
    rates: list[float] = []
    if variant.flops:
        extra["flops_per_s"] = variant.flops / median
        with contextlib.suppress(ValueError):
            if machine is not None:
                peaks = [
                    machine.peak(variant.dtype, unit=unit, threads=variant.threads)
                    for unit in ("vector", "matrix")
                ]
                rates.append(variant.flops / max(peaks))
    if variant.bytes_moved:
        extra["bytes_per_s"] = variant.bytes_moved / median
        with contextlib.suppress(ValueError):
            if machine is not None:
                limit = machine.bandwidth(variant.working_set or variant.bytes_moved, threads=variant.threads)
                rates.append(variant.bytes_moved / limit)
    if rates and variant.clock != "cuda":
        extra["fraction_of_roof"] = max(rates) / median
    return extra
