"""Reading a GPU's machine code: registers, spills, occupancy, and which instructions there are.

``read_nvidia`` takes a cubin apart with ``cuobjdump`` and ``nvdisasm``, which the Triton wheel brings;
``read_amd`` reads the assembly text that LLVM wrote. Limits a multiprocessor: NVIDIA, *CUDA C++ Programming
Guide*, "Technical Specifications per Compute Capability"; AMD, *Instinct MI300 Instruction Set Architecture*,
and LLVM's *User Guide for AMDGPU Backend* for the register files of gfx942.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Multiprocessor:
    """What its blocks share. backend, arch and lanes (threads of a warp) are Triton's ``GPUTarget``.

    warps, blocks: most resident at once. registers: 32-bit, of the whole multiprocessor, given to a warp
    in steps of ``register_step``. shared: bytes for all blocks; reserved: what each takes of them.
    schedulers: parts with registers of their own, among which a block's warps are divided.
    """

    backend: str
    arch: int | str
    lanes: int
    warps: int
    blocks: int
    registers: int
    register_step: int
    shared: int
    reserved: int
    schedulers: int = 4


TARGETS = {
    "sm_80": Multiprocessor("cuda", 80, 32, 64, 32, 65536, 256, 164 * 1024, 1024),
    "sm_90": Multiprocessor("cuda", 90, 32, 64, 32, 65536, 256, 228 * 1024, 1024),
    "sm_100": Multiprocessor("cuda", 100, 32, 64, 32, 65536, 256, 228 * 1024, 1024),
    # 4 SIMDs of 512 vector registers a lane (ordinary and accumulation ones together), 8 waves each.
    "gfx942": Multiprocessor("hip", "gfx942", 64, 32, 32, 4 * 512 * 64, 8 * 64, 64 * 1024, 0),
}

_NVIDIA = {
    "matrix": r"(?:[HIDQO]MMA|[HIQ]GMMA|UTC\w*MMA)\b",
    "tma": r"(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b",
    "async copy": r"LDGSTS\b",
    "load": r"(?:LDG|LDGSTS|UTMALDG|UBLKCP)\b",
    "wide load": r"(?:(?:LDG|LDGSTS)\.\S*\b(?:128|256)\b|UTMALDG|UBLKCP)",
    "store": r"(?:STG|UTMASTG)\b",
    "wide store": r"(?:STG\.\S*\b(?:128|256)\b|UTMASTG)",
    "local": r"(?:LDL|STL)\b",
    "roles": r"USETMAXREG\b",
}
_AMD = {
    "matrix": r"v_mfma",
    "tma": r"(?!)",
    "async copy": r"(?:global|buffer)_load_\w*lds\b|buffer_load_\w+ .*\blds\b",
    "load": r"(?:global|buffer|flat)_load_",
    "wide load": r"(?:global|buffer|flat)_load_(?:lds_)?dwordx4",
    "store": r"(?:global|buffer|flat)_store_",
    "wide store": r"(?:global|buffer|flat)_store_dwordx4",
    "local": r"scratch_",
    "roles": r"(?!)",
}


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of one kernel for one target.

    registers: of a thread (on AMD vector registers, accumulation ones among them). stack_bytes, spill_bytes:
    of a thread; the stack counts as spilled when there are loads or stores of it. shared_bytes: of a block;
    shared_limit_bytes: the most one may use. tensor_memory_columns: on sm_100, of 512. warps: of a block, all
    roles together. fits: it can be launched. blocks: resident on a multiprocessor at once; limited_by: what
    allows no more; occupancy: the share of the warps it could hold. loads, stores: instructions on global
    memory, TMA's and asynchronous copies among them; wide_loads, wide_stores: those of at least 16 bytes a
    thread. tma, async_copies: instructions (TMA; LDGSTS, that is cp.async). specialized: the compiler gave
    warps roles of their own. problems: what breaks the kernel's promises (see ``Compilation``).
    """

    label: str
    operation: str
    direction: str
    target: str
    triton: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    tensor_memory_columns: int
    warps: int
    fits: bool
    blocks: int
    limited_by: str
    occupancy: float
    instructions: int
    matrix_instructions: int
    matrix_kinds: tuple[str, ...]
    tma: int
    async_copies: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    specialized: bool
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields, for ``json.dumps``."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """One line."""
        matrix = "no matrix instructions"
        if self.matrix_instructions:
            matrix = f"{self.matrix_instructions} {'/'.join(self.matrix_kinds)}"
        copies = f"{self.tma} TMA" if self.tma else f"{self.async_copies} async copies"
        parts = [
            f"{self.label} ({self.target}): {self.registers} registers",
            f"{self.spill_bytes} B spilled" if self.spill_bytes else "no spills",
            f"{self.shared_bytes / 1024:.4g} KiB shared",
            f"{self.blocks} blocks a multiprocessor ({self.limited_by})" if self.fits else "does not fit",
            matrix,
            copies,
            f"{self.wide_loads} of {self.loads} loads of 16 bytes",
            f"{self.instructions} instructions",
        ]
        return ", ".join([*parts, *(["specialised"] if self.specialized else [])])


def facts_of(target: str, warps: int, shared: int, counted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``MachineCode`` that follow from the counts: whether it fits, and how often."""
    unit = TARGETS[target]
    shared_each, columns = shared + unit.reserved, counted["tensor_memory_columns"]
    # A warp's registers come from its scheduler's part, in steps.
    a_warp = -(-counted["registers"] * unit.lanes // unit.register_step) * unit.register_step
    held = unit.schedulers * (unit.registers // unit.schedulers // max(1, a_warp))
    limits = {
        "registers": held // warps,
        "warps": unit.warps // warps,
        "blocks": unit.blocks,
    }
    if shared_each:
        limits["shared memory"] = unit.shared // shared_each
    if columns:
        limits["tensor memory"] = 512 // columns
    limited_by, blocks = min(limits.items(), key=lambda item: item[1])
    fits = blocks > 0 and warps * unit.lanes <= 1024
    return {
        "target": target,
        "warps": warps,
        "shared_bytes": shared,
        "shared_limit_bytes": unit.shared - unit.reserved,
        "fits": fits,
        "blocks": blocks,
        "limited_by": limited_by,
        "occupancy": blocks * warps / unit.warps,
        **counted,
    }


def _counts(patterns: Mapping[str, str], instructions: list[str]) -> dict[str, Any]:
    found: Counter[str] = Counter()
    kinds = set()
    for line in instructions:
        for name, pattern in patterns.items():
            if match := re.match(pattern, line):
                found[name] += 1
                if name == "matrix":
                    kinds.add(match[0].strip("v_").upper())
    return {
        "instructions": len(instructions),
        "matrix_instructions": found["matrix"],
        "matrix_kinds": tuple(sorted(kinds)),
        "tma": found["tma"],
        "async_copies": found["async copy"],
        "loads": found["load"],
        "wide_loads": found["wide load"],
        "stores": found["store"],
        "wide_stores": found["wide store"],
        "local": found["local"],
        "roles": found["roles"],
    }


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program.name} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _disassembled(cubin: bytes) -> str:
    """Resource usage and instructions, kept in Triton's cache: the tool takes half a second to start."""
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(hashlib.sha256(b"disassembled" + cubin).hexdigest())
    if path := kept.get_file("sass"):
        return Path(path).read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without its analysis of dataflow (-ndf), of which nothing is read here: a third of the time.
        text = _tool("cuobjdump", "-res-usage", file.name) + _tool("nvdisasm", "-c", "-ndf", file.name)
    kept.put(text, "sass", binary=False)
    return text


def read_nvidia(cubin: bytes, ttgir: str, tensor_memory_columns: int) -> dict[str, Any]:
    """Counts from a cubin; ``ttgir`` is Triton's own text, which says whether warps have roles."""
    text = _disassembled(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {' '.join(text.split())[:200]}")
    registers, stack = map(int, found.groups())
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", text, re.MULTILINE)
    counts = _counts(_NVIDIA, lines)
    specialized = "ttg.warp_specialize(" in ttgir and counts.pop("roles") > 0
    counts.pop("roles", None)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_bytes": stack if counts.pop("local") else 0,
        "tensor_memory_columns": tensor_memory_columns,
        "specialized": specialized,
        **counts,
    }


def read_amd(assembly: str) -> dict[str, Any]:
    """Counts from LLVM's assembly of one kernel."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly says nothing of {name}")
        return int(found[1])

    lines = re.findall(r"^\s+([a-z]+_\w+[^;\n]*)", assembly, re.MULTILINE)
    counts = _counts(_AMD, lines)
    del counts["roles"], counts["local"]
    return {
        "registers": value("vgpr_count"),
        "stack_bytes": value("private_segment_fixed_size"),
        "spill_bytes": 4 * value("vgpr_spill_count"),
        "tensor_memory_columns": 0,
        "specialized": False,
        **counts,
    }
