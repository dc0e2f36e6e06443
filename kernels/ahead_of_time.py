"""Triton kernels compiled for GPUs that are not there, and what the compiler made of them.

Each ``kernels/<family>/gpu*.py`` lists what it ships in ``compilations()``; ``shipped`` gathers them,
``compile_for`` compiles one and reads the machine code with the tools inside the Triton wheel: registers, bytes
spilled, shared memory, blocks a multiprocessor, matrix instructions, asynchronous copies, 16-byte loads, and
whether warp specialisation engaged, which Triton drops without a word where it cannot.

These are static facts. They rule out what cannot launch or spills; they do not say which of two is faster.
A process under ``TRITON_INTERPRET=1`` cannot compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernels.interpreter import interpreting
from kernels.machine_code import TARGETS, MachineCode, read_amd, read_nvidia

__all__ = ["TARGETS", "Compilation", "MachineCode", "Report", "compile_for", "shipped"]


@dataclass(frozen=True)
class Compilation:
    """A kernel as it is shipped: which arguments, which constants, which options.

    types: argument -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``, ``"tensordesc<bf16[128,64]>"``); a
    trailing ``!`` promises a multiple of 16, without which loads are not vectorised. constants: the constexpr
    arguments. options: ``num_warps``, ``num_stages``, ``maxnreg``. operation: the public function it serves.
    direction: ``"forward"`` or ``"backward"``. matrix: it must contain matrix instructions. specialized: its
    warps must have roles of their own on Hopper. targets: those it is shipped for.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    operation: str
    direction: str
    matrix: bool = False
    specialized: bool = False
    targets: Sequence[str] = field(default=tuple(TARGETS))
