"""The first CUDA (or ROCm) device as a Machine: launch time, bandwidth curve, peaks, transfer rate.

Used by ``labs.calibration`` where ``torch.cuda`` finds a device. All times are device events. Peaks of a
device that has a spec sheet in ``labs/machines`` come from that sheet, since a product is what the lab
predicts; another device's peaks are the best batched product (``baddbmm``), an operation no lab predicts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from glob import glob
from itertools import pairwise
from typing import Any

from labs.machine import Curve, Machine, load_sheet, sheet_names

MEBI = 2**20
OTHERS = {"pcie", "nvl", "mig"}  # words of devices that have a sheet's name and not its figures
NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def _seconds(step: Callable[[], object], repeats: int, runs: int = 5) -> float:
    """Best of ``runs``: seconds of one of ``repeats`` calls between two events."""
    import torch

    step()
    torch.cuda.synchronize()
    best = math.inf
    for _ in range(runs):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(repeats):
            step()
        last.record()
        last.synchronize()
        best = min(best, first.elapsed_time(last) / 1e3 / repeats)
    return best


def sheet_of(device_name: str) -> Machine | None:
    """The spec sheet of a device by the driver's name: ``NVIDIA A100-SXM4-80GB`` -> a100, or None.

    Each part of a sheet's name must be a word of the device's (``RTX 4060`` counts as ``rtx4060`` too). A
    desktop card is not its laptop namesake; an ``H100 PCIe`` and an ``H100 NVL`` are other products than the
    SXM module, and a ``MIG`` slice is a part of one.
    """
    words = device_name.lower().replace("-", " ").split()
    known = {*words, *(left + right for left, right in pairwise(words))}
    if known & OTHERS:
        return None
    for name in sheet_names():
        parts = name.split("-")
        if known.issuperset(parts) and ("laptop" in known) == ("laptop" in parts):
            return load_sheet(name)
    return None


def _product_flops(dtype: Any, size: int) -> float:
    import torch

    a, b = (torch.randn(4, size, size, device="cuda").to(dtype) for _ in range(2))
    c = torch.zeros_like(a)
    return 4 * 2.0 * size**3 / _seconds(lambda: torch.baddbmm(c, a, b), repeats=3)


def absent() -> str:
    """Why there is no device to measure, or ``""``."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built without CUDA and ROCm"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no device"


def device_name() -> str:
    """Of the device that ``measure`` would measure, or ``""``; torch is only imported where there is one."""
    if sys.platform == "linux" and not any(map(glob, NODES)):
        return ""
    if absent():
        return ""
    import torch

    return torch.cuda.get_device_properties(0).name


def measure() -> Machine:
    """The device's constants. There is one (``absent``)."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    values: dict[str, float] = {"memory_bytes": float(properties.total_memory)}
    sources = {"memory_bytes": "device properties"}
    if getattr(properties, "L2_cache_size", 0):
        values["l2_bytes"], sources["l2_bytes"] = float(properties.L2_cache_size), "device properties"

    one = torch.ones(1, device="cuda")
    values["launch_s"] = _seconds(lambda: torch.neg(one), repeats=1, runs=50)
    sources["launch_s"] = "events around torch.neg of one element, best of 50"

    host = torch.rand(16 * MEBI).pin_memory()
    target = torch.empty_like(host, device="cuda")
    values["transfer_bytes_per_second"] = host.nbytes / _seconds(
        lambda: target.copy_(host, non_blocking=True), 2
    )
    sources["transfer_bytes_per_second"] = "64 MiB from pinned host memory"

    largest = int(min(1024 * MEBI, properties.total_memory / 8))
    source = torch.rand(largest // 8, device="cuda")
    out = torch.empty_like(source)
    sizes = [MEBI * 2**power for power in range(11) if MEBI * 2**power <= largest]
    rates = []
    for size in sizes:
        left, right = out[: size // 8], source[: size // 8]
        rates.append(size / _seconds(lambda a=left, b=right: a.copy_(b), repeats=20))  # type: ignore[misc]
    curve = Curve(tuple(map(float, sizes)), tuple(rates))

    sheet = sheet_of(properties.name)
    for name, dtype, size in (
        ("vector_float32_all_flops", torch.float32, 2048),
        ("matrix_bfloat16_all_flops", torch.bfloat16, 4096),
    ):
        if sheet and name in sheet.constants:
            values[name], sources[name] = sheet.constants[name], sheet.sources[name]
        else:
            values[name] = _product_flops(dtype, size)
            sources[name] = f"torch.baddbmm of 4 x {size}^3"
    facts = {"model": properties.name, "multiprocessors": properties.multi_processor_count}
    return Machine(properties.name, True, values, {"copy_all": curve, "read_all": curve}, facts, sources)
