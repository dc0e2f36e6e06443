"""How many warps a block's threads are: a warp has 32 lanes on NVIDIA and 64 on AMD (there called a wave).

What a thread holds, and the width of its loads, follow from the number of threads; Triton is told warps. A
configuration therefore counts threads, and the same number of them is half as many warps on AMD.
"""

from __future__ import annotations

import torch

from kernels.machine_code import TARGETS

LANES = 64 if torch.version.hip else 32
"""Threads of a warp of this machine's GPU."""


def warps_of(threads: int, lanes: int = LANES) -> int:
    """Warps of so many threads, one at least."""
    return max(1, threads // lanes)


def targets_by_lanes() -> dict[int, tuple[str, ...]]:
    """Threads of a warp -> the targets (``ahead_of_time.TARGETS``) that have such."""
    found: dict[int, tuple[str, ...]] = {}
    for target, unit in TARGETS.items():
        found[unit.lanes] = (*found.get(unit.lanes, ()), target)
    return found
