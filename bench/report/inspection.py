"""What compilers made of an operation, as a table: one row a body on a CPU, one a configuration on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kernels.assembly import Instructions
    from kernels.machine_code import MachineCode


_SHORT = {"registers": "regs", "shared memory": "smem", "tensor memory": "tmem"}


def print_gpu(codes: Sequence[MachineCode], console: Console) -> None:
    """Registers, spills, shared memory, blocks a multiprocessor, instructions; a broken promise in words."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", overflow="fold", min_width=14)
    for name in ("regs", "spill B", "KiB", "blocks", "matrix", "copies", "16-byte", "roles"):
        table.add_column(name, justify="right", no_wrap=True)
    for direction in ("forward", "backward"):
        group = [code for code in codes if code.direction == direction]
        if group:
            table.add_row(f"[bold]{direction}")
        for code in group:
            matrix = f"{code.matrix_instructions} {'/'.join(code.matrix_kinds)}"
            copies = (
                f"{code.tma} TMA" if code.tma else f"{code.async_copies} async" if code.async_copies else "-"
            )
            table.add_row(
                code.label,
                str(code.registers),
                str(code.spill_bytes),
                f"{code.shared_bytes / 1024:.1f}",
                f"{code.blocks} {_SHORT.get(code.limited_by, code.limited_by)}",
                matrix if code.matrix_instructions else "-",
                copies,
                f"{code.wide_loads}/{code.loads}",
                "yes" if code.specialized else "-",
                style="bold red" if code.problems else None,
            )
    console.print(table)
    _say("KiB: shared memory. blocks: at once on a multiprocessor, and what allows no more.", console)
    _say(
        "copies: TMA, or cp.async (async). 16-byte: loads so wide, of all. roles: warp specialised.", console
    )
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
