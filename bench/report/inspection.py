"""What compilers made of an operation, as a table: one row a body on a CPU, one a configuration on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kernels.assembly import Instructions
    from kernels.machine_code import MachineCode


def print_gpu(codes: Sequence[MachineCode], console: Console) -> None:
    """Registers, spills, shared memory, blocks a multiprocessor, instructions; a broken promise in words."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", overflow="fold", min_width=16)
    for name in (
        "regs",
        "spilled B",
        "shared KiB",
        "blocks/SM",
        "matrix",
        "copies",
        "16-byte loads",
        "roles",
    ):
        table.add_column(name, justify="right")
    for code in codes:
        matrix = f"{code.matrix_instructions} {'/'.join(code.matrix_kinds)}".strip()
        copies = f"{code.tma} TMA" if code.tma else f"{code.async_copies} async" if code.async_copies else "-"
        table.add_row(
            f"{code.label} {code.direction}",
            str(code.registers),
            str(code.spill_bytes),
            f"{code.shared_bytes / 1024:.1f}",
            f"{code.blocks} ({code.limited_by})" if code.fits else "0",
            matrix if code.matrix_instructions else "-",
            copies,
            f"{code.wide_loads}/{code.loads}",
            "yes" if code.specialized else "-",
            style="bold red" if code.problems else None,
        )
    console.print(table)
    for code in codes:
        if code.problems:
            _say(f"{code.label} {code.direction}: {', '.join(code.problems)}", console)


def print_cpu(bodies: Mapping[str, Instructions], console: Console) -> None:
    """Vector width, packed and scalar arithmetic, calls of libm."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("body", overflow="fold", min_width=24)
    for name in ("loops", "packed FMA", "packed", "scalar", "libm"):
        table.add_column(name, justify="left" if name in ("loops", "libm") else "right")
    for place, code in bodies.items():
        libm = ", ".join(f"{name} x{count}" for name, count in code.libm.items())
        table.add_row(
            place.removeprefix("kernels."),
            code.verdict,
            str(code.packed_fma),
            str(code.packed_arithmetic),
            str(code.scalar_arithmetic),
            libm or "-",
        )
    console.print(table)
    for place, code in bodies.items():
        for note in code.notes:
            _say(f"{place}: {note}", console)


def _say(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
