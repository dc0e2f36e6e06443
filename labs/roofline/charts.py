"""The roofline, the bandwidth curve, and the size from which a GPU wins, as figures.

A roof is ``min(peak, intensity x bandwidth)``: everything under it is possible, nothing above it.
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import Chart, Figure, Series
from labs.lab import Results
from labs.machine import Machine, load_sheet
from labs.roofline.model import cpu_seconds, crossover, gpu_seconds, transfer_seconds
from labs.roofline.operations import operations
from labs.roofline.prediction import FAMILIES, Family

INTENSITIES = tuple(2.0 ** (power / 2) for power in range(-8, 25))  # 1/16 to 4096 FLOP a byte
SIZE_WORDS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def _bytes(size: float) -> str:
    for unit, word in SIZE_WORDS:
        if size >= unit:
            return f"{size / unit:.3g} {word}"
    return f"{size:.0f} B"


def roof(name: str, peak: float, bandwidth: float) -> Series:
    """FLOP/s allowed at each intensity."""
    return Series(
        name, INTENSITIES, [min(peak, bandwidth * intensity) for intensity in INTENSITIES], "dashed"
    )


def _roofs(machine: Machine) -> list[Series]:
    """The roofs of a measured CPU: memory and cache, float32 and matrix bfloat16."""
    curve = machine.curves["copy_all"]
    memory = curve.working_set_bytes[-1]
    found = [
        roof("CPU float32, memory", machine.peak("float32", threads=0), machine.bandwidth(memory, threads=0))
    ]
    if "l2_bytes" in machine.constants:
        cached = machine["l2_bytes"] * machine.cores / 2
        rate = machine.bandwidth(cached, threads=0)
        found.append(roof(f"CPU float32, cache ({_bytes(cached)})", machine.peak("float32", threads=0), rate))
    if "matrix_bfloat16_all_flops" in machine.constants:
        peak = machine.peak("bfloat16", unit="matrix", threads=0)
        found.append(roof("CPU bfloat16, memory", peak, machine.bandwidth(memory, threads=0)))
    return found


def _gpu_roofs(gpu: Machine) -> list[Series]:
    rate = gpu.bandwidth(gpu.curves["copy_all"].working_set_bytes[-1], threads=0)
    mark = "" if gpu.measured else " (not measured)"
    found = [roof(f"{gpu.name} float32{mark}", gpu.peak("float32", threads=0), rate)]
    if "matrix_bfloat16_all_flops" in gpu.constants:
        found.append(roof(f"{gpu.name} bfloat16{mark}", gpu.peak("bfloat16", unit="matrix", threads=0), rate))
    return found


def machine_chart(machine: Machine) -> Chart:
    """The machine's roofs alone, for the top of a report. Takes a calibration or a spec sheet."""
    is_cpu = "copy_1" in machine.curves
    series = _roofs(machine) if is_cpu else _gpu_roofs(machine)
    if machine.gpu is not None:
        series += _gpu_roofs(machine.gpu)
    return _roofline(
        f"Limits of {machine.name}", series, "" if machine.measured else "Spec sheet: not measured."
    )


def _roofline(title: str, series: Sequence[Series], note: str) -> Chart:
    return Chart(
        title,
        "arithmetic intensity (FLOP/byte)",
        "arithmetic (FLOP/s)",
        series,
        x_log=True,
        y_log=True,
        note=note,
    )


def _points(results: Results, device: str, name: str) -> Series | None:
    found = [
        (operation, results.seconds(operation.address(device)))
        for operation in operations(results.config)
        if operation.flops and results.has(operation.address(device))
    ]
    if not found:
        return None
    return Series(
        name,
        [operation.flops / operation.bytes_moved for operation, _ in found],
        [operation.flops / seconds.value for operation, seconds in found],
        "points",
        [operation.title for operation, _ in found],
        [operation.flops / seconds.high for operation, seconds in found],
        [operation.flops / seconds.low for operation, seconds in found],
    )


def _quiet_column(results: Results) -> tuple[Results, str]:
    """The column without page faults where it was measured, and its name."""
    tuned = results.in_column("tuned")
    return (tuned, "tuned") if tuned.variants() else (results, "default")


def operations_chart(results: Results, gpu: Machine) -> Chart:
    """The measured operations under the machine's roofs."""
    shown, mode = _quiet_column(results)
    series = _roofs(results.machine) + _gpu_roofs(gpu)
    for device, name in (
        ("cpu", f"torch on the CPU, {mode} allocator"),
        ("kernels", f"our kernels on the CPU, {mode} allocator"),
        ("cuda", f"torch on {gpu.name}"),
    ):
        points = _points(shown, device, name)
        series += [points] if points else []
    return _roofline(
        "Operations under the roofs",
        series,
        "Left of the bend memory is the limit, right of it arithmetic. Small operations lie far below: "
        "the call costs more than the work. A point above the memory roof worked in cache.",
    )


def bandwidth_chart(machine: Machine) -> Chart:
    """Copy and read bandwidth over the working set."""
    words = {"copy_1": "copy, one thread", "read_1": "read, one thread"}
    words |= {"copy_all": f"copy, {machine.cores} cores", "read_all": f"read, {machine.cores} cores"}
    series = [
        Series(word, machine.curves[name].working_set_bytes, machine.curves[name].bytes_per_second, "line")
        for name, word in words.items()
        if name in machine.curves
    ]
    caches = [
        f"{word} {_bytes(machine[name])}"
        for name, word in (("l1d_bytes", "L1 a core"), ("l2_bytes", "L2 a core"), ("l3_bytes", "L3 in all"))
        if name in machine.constants
    ]
    note = f"Caches: {', '.join(caches)}. " if caches else ""
    return Chart(
        "Bandwidth over the working set", "working set (byte)", "bandwidth (byte/s)", series,
        x_log=True, y_log=True, note=note + "Plain stores; bytes read plus bytes written.",
    )  # fmt: skip


def crossover_chart(family: Family, results: Results, gpu: Machine) -> Chart:
    """Seconds over size on both devices: predicted curves, measured points."""
    machine, largest = (
        results.machine.with_allocator("tuned"),
        max(size for _, size in family.groups(results.config)),
    )
    sizes = [2**power for power in range(largest.bit_length() + 2)]
    mark = "" if gpu.measured else ", not measured"
    on_cpu = [cpu_seconds(family.operation(size), machine)[0] for size in sizes]
    on_gpu = [gpu_seconds(family.operation(size), gpu)[0] for size in sizes]
    series = [
        Series("CPU, predicted", sizes, on_cpu, "dashed"),
        Series(f"{gpu.name}, predicted{mark}", sizes, on_gpu, "dashed"),
    ]
    sent: float | None = None
    if "transfer_bytes_per_second" in gpu.constants:
        moved = [
            seconds + transfer_seconds(family.operation(size), gpu)
            for size, seconds in zip(sizes, on_gpu, strict=True)
        ]
        series.append(
            Series(f"{gpu.name}, data sent there and back, predicted{mark}", sizes, moved, "dashed")
        )
        sent = crossover(family.operation, machine, gpu, with_transfer=True)
    shown, _ = _quiet_column(results)
    for device, name in (("cpu", "CPU, measured"), ("cuda", f"{gpu.name}, measured")):
        points = [
            (size, shown.seconds(f"{group}/{device}"))
            for group, size in family.groups(results.config)
            if shown.has(f"{group}/{device}")
        ]
        if points:
            x, seconds = zip(*points, strict=True)
            low, high = [each.low for each in seconds], [each.high for each in seconds]
            series.append(Series(name, x, [each.value for each in seconds], low=low, high=high))
    there = crossover(family.operation, machine, gpu)
    note = f"Predicted: {gpu.name} wins " + (f"from {there:,.0f} {family.unit}" if there else "at no size")
    note += (
        " with the data there, " + (f"from {sent:,.0f}" if sent else "at no size") + " when it must be sent."
    )
    if not gpu.measured:
        note += " Not measured: from the vendor's sheet."
    title = f"{family.title}: from which size does the GPU win?"
    return Chart(title, f"size ({family.unit})", "time (s)", series, x_log=True, y_log=True, note=note)


def figure(results: Results) -> Sequence[Figure]:
    """Roofline, bandwidth, and time over size for an addition and a product."""
    gpu = results.machine.gpu or load_sheet(results.config.versus)
    return [
        operations_chart(results, gpu),
        bandwidth_chart(results.machine),
        *(crossover_chart(family, results, gpu) for family in FAMILIES),
    ]
