"""Triton kernels compiled for GPUs that are not there, and what the compiler made of them.

Each ``kernels/<family>/gpu*.py`` lists what it ships in ``compilations()``; ``shipped`` gathers them, and
``compile_for`` compiles one and reads the machine code (``kernels.machine_code``): registers, bytes spilled,
shared memory, blocks a multiprocessor, matrix instructions, asynchronous copies, 16-byte loads, and whether
warp specialisation engaged, which Triton drops without a word where it cannot.

These are static facts. They rule out what cannot launch or spills; they do not say which of two is faster.
A process under ``TRITON_INTERPRET=1`` cannot compile.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.interpreter import interpreting
from kernels.machine_code import TARGETS, MachineCode, facts_of, read_amd, read_nvidia

__all__ = ["TARGETS", "Compilation", "MachineCode", "compile_all", "compile_for", "shipped"]


@dataclass(frozen=True)
class Compilation:
    """A kernel as it is shipped: which arguments, which constants, which options.

    label: unique among those of its operation and direction. kernel: the ``triton.jit`` function. types:
    argument -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``, ``"tensordesc<bf16[128,64]>"``); a
    trailing ``!`` promises a multiple of 16, without which loads are not vectorised. constants: the
    constexpr arguments. options: ``num_warps``, ``num_stages``, ``maxnreg``. operation: the public
    function it serves. direction: ``"forward"`` or ``"backward"``. matrix: it must contain matrix
    instructions. specialized: its warps must have roles of their own from Hopper on. wide_loads: its
    loads must take 16 bytes; False only for a kernel that gathers single elements. targets: those it is
    shipped for.
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
    wide_loads: bool = True
    targets: Sequence[str] = tuple(TARGETS)

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "backward"):
            raise ValueError(f"direction is forward or backward, not {self.direction!r}")
        for target in self.targets:
            if target not in TARGETS:
                raise ValueError(f"targets are {', '.join(TARGETS)}, not {target!r}")


def shipped(operation: str = "", target: str = "") -> list[Compilation]:
    """What every family ships; if given, only what serves ``operation`` and is meant for ``target``."""
    root = Path(__file__).parent
    found: list[Compilation] = []
    for path in sorted(root.glob("*/gpu*.py")):
        module = importlib.import_module(f"kernels.{path.parent.name}.{path.stem}")
        found += module.compilations() if hasattr(module, "compilations") else []
    return [
        item for item in found if operation in ("", item.operation) and (not target or target in item.targets)
    ]


def compile_for(compilation: Compilation, target: str) -> MachineCode:
    """Compile for ``target`` (a key of ``TARGETS``) and read what came out.

    Needs no GPU. Kept in ``TRITON_CACHE_DIR``. ValueError when the compilation does not describe its kernel,
    or this process interprets its kernels; RuntimeError when Triton cannot compile it.
    """
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"targets are {', '.join(TARGETS)}, not {target!r}{hint}")
    if interpreting():
        raise ValueError(
            "under TRITON_INTERPRET=1 Triton kernels are interpreted and cannot be compiled: unset it"
        )
    import triton

    unit, source = TARGETS[target], _source(compilation)
    try:
        compiled = triton.compile(
            source,
            target=triton.backends.compiler.GPUTarget(unit.backend, unit.arch, unit.lanes),
            # Triton 3.10 changes the default: the kernels count on fused multiply-add.
            options={"enable_fp_fusion": True, **compilation.options},
        )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RuntimeError(f"{compilation.label} does not compile for {target}: {lines[-1]}") from error
    metadata = compiled.metadata
    if unit.backend == "cuda":
        columns = getattr(metadata, "tmem_size", 0) or 0
        counted = read_nvidia(compiled.asm["cubin"], compiled.asm["ttgir"], columns)
    else:
        counted = read_amd(compiled.asm["amdgcn"])
    facts = facts_of(target, metadata.num_warps, metadata.shared, counted)
    return MachineCode(
        label=compilation.label,
        operation=compilation.operation,
        direction=compilation.direction,
        triton=triton.__version__,
        problems=_problems(compilation, facts),
        **facts,
    )


def compile_all(
    compilations: Sequence[Compilation], target: str
) -> Iterator[tuple[Compilation, MachineCode | RuntimeError]]:
    """``compile_for`` each, several at a time: what came out, or why nothing did. In the given order."""

    def outcome(compilation: Compilation) -> MachineCode | RuntimeError:
        try:
            return compile_for(compilation, target)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(outcome, compilations))
    for compilation, made in zip(compilations, found, strict=True):
        # CPython 3.11 counts the depth of its parser once for all threads, and fails where two parse at the
        # same time ("AST constructor recursion depth mismatch"): a failure counts when it repeats alone.
        yield compilation, outcome(compilation) if isinstance(made, RuntimeError) else made


def _source(compilation: Compilation) -> Any:
    """What ``triton.compile`` takes; ValueError when the arguments are not the kernel's."""
    from triton.compiler import ASTSource

    kernel = compilation.kernel
    names = list(kernel.arg_names)
    given = {*compilation.types, *compilation.constants}
    unknown, missing = sorted(given - set(names)), [name for name in names if name not in given]
    both = sorted({*compilation.types} & {*compilation.constants})
    for fault, which in (("unknown", unknown), ("missing", missing), ("both typed and constant", both)):
        if which:
            raise ValueError(
                f"{compilation.label}: {fault} arguments of {kernel.__name__}: {', '.join(which)}"
            )
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        kind = compilation.types.get(name, "constexpr")
        if kind.endswith("!"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = kind.rstrip("!")
    make: Any = ASTSource
    if getattr(kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource

        make = GluonASTSource
    return make(kernel, signature, dict(compilation.constants), attributes)


def _problems(compilation: Compilation, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the machine code breaks what the compilation promises."""
    checks = {
        f"{facts['spill_bytes']} bytes spilled": facts["spill_bytes"] > 0,
        "cannot be launched": not facts["fits"],
        "no matrix instructions": compilation.matrix and not facts["matrix_instructions"],
        "no load of 16 bytes": compilation.wide_loads and facts["loads"] > 0 and not facts["wide_loads"],
        "not specialised": compilation.specialized
        and facts["target"] in ("sm_90", "sm_100")
        and not facts["specialized"],
    }
    return tuple(text for text, broken in checks.items() if broken)
