"""AMX tiles of a CPU: whether this process may use them, their configuration, their instructions.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter on AMX (LDTILECFG);
Linux Documentation/arch/x86/xstate.rst (permission to use tile data: ``arch_prctl``).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir

from kernels.ir_vectors import declare
from kernels.simd import host_features

_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


def amx_unavailable() -> str:
    """Why bf16 tiles cannot be used by this process, or "" after the kernel has given permission."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "AMX needs x86-64 Linux"
    if not {"amx-bf16", "amx-tile"} <= host_features():
        return "this CPU has no AMX bf16 tiles"
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA):
        return f"the kernel refused tile data: {os.strerror(ctypes.get_errno())}"
    return ""


def tile_config() -> Any:
    """The 64 bytes LDTILECFG reads: palette 1, eight tiles of 16 rows x 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return config


def emit(builder: Any, name: str, kinds: list[Any], values: list[Any]) -> None:
    """IR of one instruction. Tile numbers are immediates; the tiles are this thread's alone."""
    builder.call(declare(builder, f"llvm.x86.{name}", ir.VoidType(), kinds), values)
