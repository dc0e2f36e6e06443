"""Measure this machine's constants (``perflab calibrate``): about 20 s, once per machine and software.

    python -m labs.calibration [--force]

prints one JSON line; progress goes to stderr. What each constant means stands in ``Machine.sources``;
how it is measured, in ``calibration_hardware`` (peaks, bandwidth, page faults), ``calibration_calls``
(interpreter, libraries, threads), ``calibration_transforms`` (JAX's and torch's transformed programs),
``calibration_compilers``, ``calibration_processes``, ``calibration_links`` (messages between ranks),
``calibration_gpu`` and ``calibration_facts``.

The result is cached. Each run measures all anew when a package or the accelerator is another one, checks a
few anchors again (2 s) and measures all anew when one is more than 15 % off: a laptop on battery is another
machine. Constants younger than ten minutes are kept then, and the run says so: a machine that moves that fast
shares its cores. Before each lab, in its process, one constant of each kind is measured again
(``calibration_anchors``), and predictions go with what has changed. What was left out is tried again.
Ceilings are held against the next one up, so that a compiler artefact does not pass for a fast memory
(``doubts``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from labs import calibration_hardware
from labs import machine as machines
from labs.calibration_hardware import Figures, largest_working_set
from labs.machine import Curve, Machine

SWEEPS = 3  # over all parts: a neighbour's burst lasts longer than one part, seldom as long as a sweep
BUDGET_S = 17.0
TOLERANCE = 0.15  # an anchor further off than this means another machine
FRESH_S = 600.0  # what moved that far in less time moves to and fro: measuring again would chase it
FAILED = "not measured: "  # a device is there
Progress = Callable[[str], None] | None
Part = tuple[str, Callable[[], Figures]]


def calibrate(progress: Progress = None, sweeps: int = SWEEPS) -> Machine:
    """Measure everything, up to ``sweeps`` times. ``progress`` gets a line before each part.

    Parts that fail, as where their library is missing, are left out: ``facts["left_out"]`` says why.
    """
    from labs import calibration_facts

    say = progress or (lambda line: None)
    begin = time.perf_counter()
    cores = machines.usable_cores()
    values: dict[str, float] = {"cores": float(cores), "memory_bytes": calibration_facts.memory_bytes()}
    values |= calibration_facts.caches()
    sources = {name: "operating system" for name in values}
    largest = largest_working_set(values.get("l3_bytes", 0.0), values["memory_bytes"])
    found: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    left_out: dict[str, str] = {}

    def measure(parts: Sequence[Part], sweep: int) -> None:
        for name, part in parts:
            say(f"{name}, {sweep} of {sweeps} ({time.perf_counter() - begin:.0f} s)")
            for key, (value, source) in _measured(name, part, left_out).items():
                found.setdefault(key, []).append(value)
                sources[key] = source

    swept, last_s = 0, 0.0
    while swept < sweeps and time.perf_counter() - begin + last_s < BUDGET_S:
        swept += 1
        if swept == 1:
            measure(_first(), swept)
        start = time.perf_counter()
        measure(_parts(cores), swept)
        say(f"bandwidth over working sets, {swept} of {sweeps} ({time.perf_counter() - begin:.0f} s)")
        curves = _faster(curves, calibration_hardware.curves(cores, largest))
        last_s = time.perf_counter() - start
        if swept == 1:
            with _compilers() as parts:
                measure(parts, swept)
    values |= {key: combine(key, samples) for key, samples in found.items()}
    facts = calibration_facts.facts() | {"sweeps": swept}
    gpu = _accelerator(facts)
    if left_out:
        facts["left_out"] = left_out
    facts["calibrated_in"] = f"{time.perf_counter() - begin:.1f} s"
    machine = Machine(
        name=f"{facts['model']}, {cores} core{'s' if cores > 1 else ''}",
        measured=True,
        constants=values,
        curves=curves,
        facts=facts,
        sources=sources,
        gpu=gpu,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if doubtful := doubts(machine):
        machine = replace(machine, facts={**machine.facts, "doubts": doubtful})
    return machine


def _measured(name: str, part: Callable[[], Figures], left_out: dict[str, str]) -> Figures:
    """Its figures; none, and an entry of ``left_out``, where it fails. One success forgets failures."""
    try:
        figures = part()
    except Exception as error:  # a library's own kinds too: one part must not cost all the others
        left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())
        return {}
    left_out.pop(name, None)
    return figures


def _accelerator(facts: dict[str, Any]) -> Machine | None:
    """The GPU's constants; where there are none, ``facts["gpu"]`` says why."""
    from labs import calibration_gpu

    facts.pop("gpu", None)
    reason = calibration_gpu.absent()
    if reason:
        facts["gpu"] = f"none: {reason}"
        return None
    try:
        return calibration_gpu.measure()
    except Exception as error:
        facts["gpu"] = f"{FAILED}{' '.join(str(error).split())}"
        return None


def _first() -> Sequence[Part]:
    """Measured once, since most of it is importing torch."""
    from labs import calibration_links

    return (("links", calibration_links.measure),)


def _parts(cores: int) -> Sequence[Part]:
    """Processes first and the interpreter second: before large libraries bring their threads."""
    from labs import calibration_calls as calls
    from labs import calibration_processes
    from labs import calibration_transforms as transforms

    return (
        ("processes", calibration_processes.measure),
        ("interpreter", calls.python),
        ("threads", calls.threads),
        ("pickling", calls.pickling),
        ("arithmetic peaks", lambda: calibration_hardware.peaks(cores)),
        ("page faults", lambda: calibration_hardware.page_faults(cores)),
        ("numpy and numba", calls.compiled),
        ("torch", calls.torch_calls),
        ("jax", calls.jax_calls),
        ("programs of jax", transforms.jax_programs),
        ("programs of torch", transforms.torch_programs),
        ("products of torch", transforms.torch_products),
        ("thin products of torch", transforms.thin_products),
        ("products of numpy", transforms.numpy_products),
    )


@contextmanager
def _compilers() -> Iterator[Sequence[Part]]:
    """Measured once, since most of it is importing compilers."""
    from labs import calibration_compilers as compilers

    with compilers.cxx_compiler_beside() as cxx_compiler:
        yield (
            ("numba's compiler", compilers.numba_compiler),
            ("JAX's compiler", compilers.jax_compiler),
            ("torch's capture", compilers.torch_capture),
            ("C++ compiler", cxx_compiler),
        )


def combine(name: str, samples: Sequence[float]) -> float:
    """The best of all sweeps for a limit, since disturbance only slows; the median for a cost."""
    return max(samples) if name.endswith("_flops") else statistics.median(samples)


def _faster(left: dict[str, Curve], right: dict[str, Curve]) -> dict[str, Curve]:
    """The upper hull of two measurements of the same curves."""
    if not left:
        return right
    return {
        name: Curve(
            curve.working_set_bytes,
            tuple(map(max, curve.bytes_per_second, left[name].bytes_per_second)),
        )
        for name, curve in right.items()
    }


def doubts(machine: Machine) -> list[str]:
    """Figures that the next ceiling up does not allow: each a sentence. Empty when all fit.

    A core adds at most one register for each FMA it can do, give or take a second adder, so a read that
    sums cannot pass 2 x the bytes its FMA units take in; a copy moves a load and a store meanwhile.
    """
    found = []

    def hold(name: str, value: float, bound: float, why: str) -> None:
        if value > bound:
            found.append(f"{name} = {value:.3g} is above {bound:.3g}: {why}")

    one = machine["vector_float32_1_flops"]
    registers = one / 2 * 4  # bytes a second that pass through the FMA units
    hold(
        "all cores, float32 FLOP/s",
        machine["vector_float32_all_flops"],
        1.3 * machine.cores * one,
        "cores x one core",
    )
    hold("scalar FLOP/s", machine["scalar_float32_flops"], 1.1 * one, "single floats cannot beat registers")
    for suffix, count in (("1", 1), ("all", machine.cores)):
        for kind, factor in (("read", 2), ("copy", 4)):
            peak = max(machine.curves[f"{kind}_{suffix}"].bytes_per_second)
            hold(
                f"{kind} bandwidth, {suffix}",
                peak,
                factor * count * registers,
                "what the registers can take in",
            )
    return found


# --- anchors ---------------------------------------------------------------------------------------


def _anchors(machine: Machine) -> dict[str, tuple[float, Callable[[], float]]]:
    """name -> (cached value, measuring it again): larger is faster in each."""
    from labs.calibration_calls import python_operation
    from labs.calibration_hardware import bandwidths, vector_rate

    size = machine.curves["copy_all"].working_set_bytes[-1]
    anchors: dict[str, tuple[float, Callable[[], float]]] = {
        "vector_float32_1_flops": (machine["vector_float32_1_flops"], vector_rate),
        "copy_all": (
            machine.bandwidth(size, threads=0),
            lambda: bandwidths(machine.cores, [int(size)], runs=4)["copy"][0],
        ),
    }
    if "python_operation_s" in machine.constants:
        anchors["python_operation_s"] = (1 / machine["python_operation_s"], lambda: 1 / python_operation())
    return anchors


def recheck(machine: Machine, seconds: float = 2.0) -> dict[str, float]:
    """Speed now over speed then of a few anchors, in about 2 s at most.

    One core's FMA rate, the copy rate of all cores from memory, an interpreted operation. An anchor that
    is off is tried again until the time is up, since a neighbour's burst does not make another machine.
    """
    deadline = time.perf_counter() + seconds
    anchors = _anchors(machine)
    ratios = {name: measure() / cached for name, (cached, measure) in anchors.items()}
    while time.perf_counter() < deadline:
        off = [name for name, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE]
        if not off:
            break
        for name in off:
            cached, measure = anchors[name]
            ratios[name] = min(ratios[name], measure() / cached, key=lambda ratio: abs(ratio - 1))
    return ratios


def _age_s(machine: Machine) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(machine.measured_at)).total_seconds()


def outdated(machine: Machine) -> str:
    """What of the software and the accelerator is not what was measured, or ``""``."""
    from labs import calibration_facts, calibration_gpu

    then, now = machine.facts.get("versions", {}), calibration_facts.versions()
    changed = [
        f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    failed = str(machine.facts.get("gpu", "")).startswith(FAILED)  # tried again by ``_completed``
    was, is_now = machine.gpu.name if machine.gpu else "", calibration_gpu.device_name()
    if was != is_now and not failed:
        changed.append(f"GPU {was or 'none'} -> {is_now or 'none'}")
    return ", ".join(changed)


def _completed(machine: Machine, progress: Progress) -> Machine:
    """With what was left out and can be measured now; the same object where that is nothing."""
    left_out = dict(machine.facts.get("left_out", {}))
    facts = {key: value for key, value in machine.facts.items() if key != "left_out"}
    constants, sources, gpu = dict(machine.constants), dict(machine.sources), machine.gpu

    def retry(parts: Sequence[Part]) -> None:
        for name, part in parts:
            if name in left_out:
                if progress:
                    progress(f"{name}, left out at first ({left_out[name]})")
                for key, (value, source) in _measured(name, part, left_out).items():
                    constants[key], sources[key] = value, source

    retry((*_first(), *_parts(machine.cores)))
    if left_out:
        with _compilers() as parts:
            retry(parts)
    if str(facts.get("gpu", "")).startswith(FAILED):
        gpu = _accelerator(facts)
    if left_out:
        facts["left_out"] = left_out
    if facts == machine.facts and gpu is machine.gpu:
        return machine
    return replace(machine, constants=constants, sources=sources, facts=facts, gpu=gpu)


def current(progress: Progress = None, force: bool = False) -> tuple[Machine, str]:
    """The machine's constants, and a line that says where they come from: cache, or measured now."""
    cached = None if force else machines.load_cached()
    if cached is not None:
        message, kept = _judged(cached)
        if kept:
            completed = _completed(cached, progress)
            if completed is not cached:
                machines.save(completed)
            return completed, message
    else:
        message = (
            "measured on request" if force else "measured for the first time on this machine and software"
        )
    if progress:
        progress(f"calibrating: {message}")
    machine = calibrate(progress)
    path = machines.save(machine)
    return machine, f"{message}, {machine.facts['calibrated_in']}, kept in {path}"


def _judged(cached: Machine) -> tuple[str, bool]:
    """(what is found about cached constants, whether they are kept)."""
    if other := outdated(cached):
        return f"measured anew, since the software or the accelerator is another ({other})", False
    try:
        ratios = recheck(cached)
    except (KeyError, ValueError):  # an older file without a figure that is asked for today
        return "measured anew, since the cached file lacks an anchor", False
    off = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE}
    if not off:
        return f"constants of {cached.measured_at} hold: anchors within {TOLERANCE:.0%}", True
    reason = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in off.items())
    if _age_s(cached) < FRESH_S:
        return f"this machine's speed is changing by the minute ({reason}): predictions may be off", True
    return f"measured anew, since the cached constants no longer hold ({reason})", False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m labs.calibration", description="Measure this machine's constants."
    )
    parser.add_argument(
        "--force", action="store_true", help="measure anew even when the cached constants hold"
    )
    options = parser.parse_args()
    machine, message = current(lambda line: print(line, file=sys.stderr, flush=True), options.force)
    print(json.dumps({"message": message, "path": str(machines.cache_path()), "machine": machine.to_json()}))


if __name__ == "__main__":
    main()
