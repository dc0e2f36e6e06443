"""Measure this machine's constants (``perflab calibrate``): about 15 s, once per machine and software.

    python -m labs.calibration [--force]

prints one JSON line; progress goes to stderr. What each constant means stands in ``Machine.sources``;
how it is measured, in ``calibration_hardware`` (peaks, bandwidth, page faults), ``calibration_calls``
(interpreter, libraries, threads), ``calibration_transforms`` (JAX's and torch's transformed programs),
``calibration_compilers``, ``calibration_processes``, ``calibration_links`` (messages between ranks),
``calibration_gpu`` and ``calibration_facts``.

The result is cached. Each run checks a few anchors again (2 s) and measures all anew when one is more
than 15 % off: a laptop on battery is another machine. Constants younger than ten minutes are kept and
the run says so: a machine that moves that fast shares its cores. Ceilings are held against the next one
up, so that a compiler artefact does not pass for a fast memory (``doubts``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from labs import calibration_hardware
from labs import machine as machines
from labs.calibration_hardware import Figures, largest_working_set, rate
from labs.machine import Curve, Machine

SWEEPS = 3  # over all parts: a neighbour's burst lasts longer than one part, seldom as long as a sweep
BUDGET_S = 17.0
TOLERANCE = 0.15  # an anchor further off than this means another machine
FRESH_S = 600.0  # what moved that far in less time moves to and fro: measuring again would chase it
Progress = Callable[[str], None] | None


def calibrate(progress: Progress = None, sweeps: int = SWEEPS) -> Machine:
    """Measure everything, up to ``sweeps`` times. ``progress`` gets a line before each part.

    Parts whose library is missing are left out and named in ``facts["left_out"]``.
    """
    from labs import calibration_facts, calibration_links

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
    for sweep in range(sweeps):
        once = [("links", calibration_links.measure)] if sweep == 0 else []  # mostly importing torch
        late = _compilers() if sweep == 0 else ()  # mostly importing them
        for name, part in (*once, *_parts(cores), *late):
            say(f"{name}, {sweep + 1} of {sweeps} ({time.perf_counter() - begin:.0f} s)")
            try:
                figures = part()
            except (ImportError, OSError, RuntimeError) as error:
                left_out[name] = str(error)
                continue
            for key, (value, source) in figures.items():
                found.setdefault(key, []).append(value)
                sources[key] = source
        say(f"bandwidth over working sets, {sweep + 1} of {sweeps} ({time.perf_counter() - begin:.0f} s)")
        curves = _faster(curves, calibration_hardware.curves(cores, largest))
        if time.perf_counter() - begin > BUDGET_S * (sweep + 1) / (sweep + 2):
            break  # another sweep would not fit
    values |= {key: combine(key, samples) for key, samples in found.items()}
    facts = calibration_facts.facts()
    if left_out:
        facts["left_out"] = left_out

    gpu = None
    try:
        from labs import calibration_gpu

        gpu = calibration_gpu.measure()
    except (ImportError, RuntimeError) as error:
        facts["gpu"] = f"not measured: {error}"
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


def _parts(cores: int) -> Sequence[tuple[str, Callable[[], Figures]]]:
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
    )


def _compilers() -> Sequence[tuple[str, Callable[[], Figures]]]:
    from labs import calibration_compilers as compilers

    return (
        ("numba's compiler", compilers.numba_compiler),
        ("JAX's compiler", compilers.jax_compiler),
        ("torch's capture", compilers.torch_capture),
        ("C++ compiler", compilers.cxx_compiler),
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
    from kernels import peaks as kernel
    from labs.calibration_calls import python_operation
    from labs.calibration_hardware import bandwidths

    size = machine.curves["copy_all"].working_set_bytes[-1]
    anchors: dict[str, tuple[float, Callable[[], float]]] = {
        "vector_float32_1_flops": (
            machine["vector_float32_1_flops"],
            lambda: rate([kernel.fma32], kernel.FLOPS_FMA32, seconds=0.01),
        ),
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


def current(progress: Progress = None, force: bool = False) -> tuple[Machine, str]:
    """The machine's constants, and a line that says where they come from: cache, or measured now."""
    cached = None if force else machines.load_cached()
    if cached is not None:
        try:
            off = {name: ratio for name, ratio in recheck(cached).items() if abs(ratio - 1) > TOLERANCE}
        except (KeyError, ValueError):  # an older file without a figure that is asked for today
            off = {"cached file": float("nan")}
        if not off:
            return cached, f"constants of {cached.measured_at} hold: anchors within {TOLERANCE:.0%}"
        reason = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in off.items())
        if _age_s(cached) < FRESH_S and "cached file" not in off:
            return (
                cached,
                f"this machine's speed is changing by the minute ({reason}): predictions may be off",
            )
        message = f"measured anew, since the cached constants no longer hold ({reason})"
    else:
        message = (
            "measured on request" if force else "measured for the first time on this machine and software"
        )
    if progress:
        progress(f"calibrating: {message}")
    machine = calibrate(progress)
    path = machines.save(machine)
    return machine, f"{message}, {machine.facts['calibrated_in']}, kept in {path}"


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
