"""Reading machine code: how much of it is SIMD, how wide, in which loops, and which calls of libm.

``read_assembly`` counts what stands in LLVM's assembly text; ``kernels.inspect`` gets that text. The verdict
is that of the deepest loops: a packed loop's scalar remainder, or packed code that only clears an array
outside the loop nest, do not count.

x86 is read in full; AArch64 as far as NEON goes; on any other CPU the verdict is "unknown".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# --- what is reported ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """Floating-point instructions of one innermost loop, counted once (not per iteration).

    packed_bits: register width of its packed arithmetic, 0 when there is none. depth: 1 for a loop that
    stands in no other. calls: scalar libm functions called in it.
    """

    depth: int
    packed: int
    scalar: int
    packed_bits: int
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instructions:
    """Counts of instructions in a function's machine code.

    isa: ``x86_64``, ``aarch64`` or what LLVM's triple says. cpu: the CPU that LLVM compiled for.
    registers: instructions by the widest register they name (``zmm`` 512, ``ymm`` 256, ``xmm`` 128 bits;
    ``v`` on AArch64). packed_arithmetic, scalar_arithmetic: floating-point add, multiply, divide, root,
    minimum, maximum and the fused ones, which are also counted apart. packed_integer: the same for
    integers. float64: how many of all these compute in double precision. matrix: bf16 dot products and tiles.
    libm: scalar library functions that are called, with the number of places.
    """

    function: str
    signature: str
    isa: str
    cpu: str
    registers: Mapping[str, int]
    packed_fma: int
    scalar_fma: int
    packed_arithmetic: int
    scalar_arithmetic: int
    packed_integer: int
    float64: int
    matrix: int
    libm: Mapping[str, int]
    loops: Sequence[Loop]
    notes: Sequence[str] = ()

    @property
    def deciding_loops(self) -> Sequence[Loop]:
        """The deepest loops that compute with floating-point numbers."""
        busy = [loop for loop in self.loops if loop.packed or loop.scalar or loop.calls]
        deepest = max((loop.depth for loop in busy), default=0)
        return [loop for loop in busy if loop.depth == deepest]

    @property
    def vector_bits(self) -> int:
        """Register width of the arithmetic in the deepest loops; 0 when they are scalar."""
        loops = self.deciding_loops
        if any(loop.calls for loop in loops):
            return 0  # a scalar call in the loop keeps the loop scalar
        return max((loop.packed_bits for loop in loops), default=0)

    @property
    def verdict(self) -> str:
        """``packed, 512 bit``, ``scalar``, ``scalar, calls expf``, ``no floating-point loop``, ``unknown``"""
        if self.isa not in _DIALECTS:
            return "unknown"
        if not self.deciding_loops:
            return "no floating-point loop"
        if self.vector_bits:
            return f"packed, {self.vector_bits} bit"
        calls = sorted({name for loop in self.deciding_loops for name in loop.calls})
        return "scalar" + (f", calls {', '.join(calls)}" if calls else "")

    @property
    def summary(self) -> str:
        """One line for people."""
        registers = ", ".join(f"{count} {name}" for name, count in self.registers.items()) or "none"
        parts = [
            f"{self.function}({self.signature}): {self.verdict}",
            f"fma {self.packed_fma} packed {self.scalar_fma} scalar",
            f"all arithmetic {self.packed_arithmetic} packed {self.scalar_arithmetic} scalar",
            f"vector registers {registers}",
        ]
        if self.libm:
            parts.append("libm " + ", ".join(f"{name} x{count}" for name, count in self.libm.items()))
        return "; ".join([*parts, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: all fields, and the verdict, width and summary that follow from them."""
        return {
            **asdict(self),
            "vector_bits": self.vector_bits,
            "verdict": self.verdict,
            "summary": self.summary,
        }


# --- reading assembly ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dialect:
    """How one instruction set writes what is counted: patterns on ``mnemonic operands``."""

    packed: re.Pattern[str]
    scalar: re.Pattern[str]
    fused: re.Pattern[str]
    integer: re.Pattern[str]
    double: re.Pattern[str]
    matrix: re.Pattern[str]
    branch: re.Pattern[str]  # its first group is the label
    leaves: re.Pattern[str]  # what follows is not reached from here
    call: re.Pattern[str]
    registers: Mapping[str, int]  # prefix -> bits, widest first

    def width(self, line: str) -> tuple[str, int]:
        for name, bits in self.registers.items():
            if re.search(rf"(?<![\w.]){'%' if name != 'v' else ''}{name}\d", line):
                return name, bits
        return "", 0


_PLAIN = r"(?:add|sub|mul|div|sqrt|max|min|rcp14|rsqrt14|rcp|rsqrt|scalef|rndscale|round|addsub|hadd)"
_FUSED = r"(?:fn?madd|fn?msub|fmaddsub|fmsubadd)\d*"
_NEON = r"(?:fadd|fsub|fmul|fdiv|fsqrt|fmaxnm|fminnm|fmax|fmin|fmla|fmls|fabd)"
_DIALECTS = {
    "x86_64": _Dialect(
        packed=re.compile(rf"^v?(?:{_PLAIN}|{_FUSED})p[sdh]\b"),
        scalar=re.compile(rf"^v?(?:{_PLAIN}|{_FUSED})s[sdh]\b"),
        fused=re.compile(rf"^v?{_FUSED}[ps][sdh]\b"),
        integer=re.compile(r"^v?p(?:add|sub|mul|max|min|madd)\w*\b"),
        double=re.compile(r"^\w+[ps]d\b"),
        matrix=re.compile(r"^(?:tdp\w+|vdpbf16ps)\b"),
        branch=re.compile(r"^j\w+\s+(\.L\S+)$"),
        leaves=re.compile(r"^(?:jmp|ret|ud2)"),
        call=re.compile(r"^(?:call|jmp)"),
        registers={"zmm": 512, "ymm": 256, "xmm": 128},
    ),
    "aarch64": _Dialect(
        packed=re.compile(rf"^{_NEON}(?:\.\d+[sdh])?\s+v\d+"),
        scalar=re.compile(
            r"^(?:fn?madd|fn?msub|fadd|fsub|fn?mul|fdiv|fsqrt|fmaxnm|fminnm|fmax|fmin)\s+[sdh]\d+"
        ),
        fused=re.compile(r"^(?:fmla|fmls|fn?madd|fn?msub)\b"),
        integer=re.compile(r"^(?:add|sub|mul|mla|smax|smin|umax|umin)(?:\.\d+[bsdh])?\s+v\d+"),
        double=re.compile(r"^f\w+(?:\.2d\s|\s+(?:d\d|v\d+\.2d))"),
        matrix=re.compile(r"^(?:bfmmla|bfdot|fmopa)\b"),
        branch=re.compile(r"^(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\S+)$"),
        leaves=re.compile(r"^(?:b|br|ret|brk)\b(?!\.)"),
        call=re.compile(r"^(?:bl|b|adrp)\b"),
        registers={"v": 128},
    ),
}
_LIBM = re.compile(
    r"(?<![\w.])((?:sin|cos|tan|asin|acos|atan|atan2|sinh|cosh|tanh|exp|exp2|expm1|log|log2|log10|log1p|pow|"
    r"erf|erfc|hypot|fmod|cbrt|floor|ceil|round|trunc|tgamma|lgamma|fmax|fmin|fma|ldexp)f?)(?![\w.])"
)
# Symbols that are not the function: how Python calls it, and memory management. The wrapper of a parallel
# loop (__gufunc__) is read, because the loop's body is often inlined into it.
_WRAPPERS = ("_ZN7cpython", "cfunc.", "NRT_", "numba_")


def _functions(assembly: str) -> Iterator[list[str]]:
    """The lines of each function that does the work, stripped of comments."""
    name = ""
    lines: list[str] = []
    kinds: dict[str, str] = {}
    for raw in assembly.splitlines():
        line = raw.split("#", 1)[0].strip() if "#" in raw and '"' not in raw else raw.strip()
        declared = re.match(r"\.type\s+(\S+?),\s*[@%](\w+)", line)
        if declared:
            kinds[declared[1]] = declared[2]
        label = re.match(r"^([^\s:]+):", line)
        if label and kinds.get(label[1]) == "function":
            name, lines = label[1], []
        elif name and re.match(rf"\.size\s+{re.escape(name)},", line):
            if not name.startswith(_WRAPPERS):
                yield lines
            name = ""
        elif name:
            lines.append(line)


def _count(lines: Sequence[str], dialect: _Dialect) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        if line.startswith(".") or not line:
            continue
        register, bits = dialect.width(line)
        if register:
            found[f"register {register}"] += 1
        packed, scalar = bool(dialect.packed.match(line)), bool(dialect.scalar.match(line))
        found["packed"] += packed
        found["scalar"] += scalar
        if dialect.fused.match(line):
            found["packed fma"] += packed
            found["scalar fma"] += scalar
        if packed:
            found["bits"] = max(found["bits"], bits)
        found["float64"] += (packed or scalar) and bool(dialect.double.match(line))
        found["matrix"] += bool(dialect.matrix.match(line))
        found["integer"] += bool(dialect.integer.match(line))
        for called in _LIBM.findall(line.split(None, 1)[-1]) if dialect.call.match(line) else ():
            found[f"libm {called}"] += 1
    return found


def _resolve_calls(lines: Sequence[str]) -> list[str]:
    """numba loads a function's address into a register, often before the loop: put its name into the call."""
    holds: dict[str, str] = {}
    resolved = []
    for line in lines:
        if loaded := re.match(r"^mov\w*\s+\$([A-Za-z_]\w*),\s*(%r\w+)$", line):
            holds[loaded[2]] = loaded[1]
            continue
        called = re.match(r"^(callq?|jmpq?)\s+\*(%r\w+)", line)
        resolved.append(f"{called[1]} {holds[called[2]]}" if called and called[2] in holds else line)
    return resolved


def _blocks(lines: Sequence[str], dialect: _Dialect) -> tuple[list[list[str]], list[set[int]]]:
    """Basic blocks and the successors of each."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if line.startswith(".L") and line.endswith(":"):
            blocks.append([])
            labels[line[:-1]] = len(blocks) - 1
        elif line and not line.startswith("."):
            blocks[-1].append(line)
            if dialect.branch.match(line) or dialect.leaves.match(line):
                blocks.append([])
    follows: list[set[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else ""
        jump = dialect.branch.match(last)
        after = {labels[jump[1]]} if jump and jump[1] in labels else set()
        if not dialect.leaves.match(last) and index + 1 < len(blocks):
            after.add(index + 1)
        follows.append(after)
    return blocks, follows


def _loops(lines: Sequence[str], dialect: _Dialect) -> Iterator[Loop]:
    """Innermost natural loops (a jump back to a block that dominates it) and how deep they are nested.

    Aho, Lam, Sethi, Ullman, Compilers, section 9.6.
    """
    blocks, follows = _blocks(lines, dialect)
    before: list[set[int]] = [set() for _ in blocks]
    for index, after in enumerate(follows):
        for successor in after:
            before[successor].add(index)
    reached, waiting = {0}, [0]
    while waiting:
        waiting.extend(new := follows[waiting.pop()] - reached)
        reached |= new
    order = sorted(reached)
    dominators = {index: set(order) for index in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            common = set.intersection(*(dominators[previous] for previous in before[index] & reached)) | {
                index
            }
            if common != dominators[index]:
                dominators[index], changed = common, True
    bodies: dict[int, set[int]] = {}
    for tail in order:
        for head in follows[tail] & dominators[tail]:
            body = bodies.setdefault(head, {head})
            waiting = [tail]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(before[block] & reached)
    for head, body in bodies.items():
        if any(other != head and other in body for other in bodies):
            continue
        depth = sum(head in other for other in bodies.values())
        found = _count([line for block in sorted(body) for line in blocks[block]], dialect)
        calls = tuple(sorted(name[5:] for name in found if name.startswith("libm ")))
        yield Loop(depth, found["packed"], found["scalar"], found["bits"], calls)


def read_assembly(assembly: str, function: str, signature: str, isa: str, cpu: str = "") -> Instructions:
    """Count what is in ``assembly`` (AT&T syntax on x86, as LLVM prints it) of all functions but wrappers."""
    notes: list[str] = []
    dialect = _DIALECTS.get(isa)
    total: Counter[str] = Counter()
    loops: list[Loop] = []
    if dialect is None:
        notes.append(f"instructions of {isa} are not known here: nothing counted")
    else:
        for lines in map(_resolve_calls, _functions(assembly)):
            found = _count(lines, dialect)
            total.update({name: count for name, count in found.items() if name != "bits"})
            loops.extend(_loops(lines, dialect))
        if isa == "aarch64" and re.search(r"\bz\d+\.[bhsd]\b", assembly):
            notes.append("SVE instructions are present and not counted")
    if total["float64"]:
        notes.append(f"{total['float64']} instructions compute in float64")
    return Instructions(
        function=function,
        signature=signature,
        isa=isa,
        cpu=cpu,
        registers={
            name: total[f"register {name}"]
            for name in (dialect.registers if dialect else ())
            if total[f"register {name}"]
        },
        packed_fma=total["packed fma"],
        scalar_fma=total["scalar fma"],
        packed_arithmetic=total["packed"],
        scalar_arithmetic=total["scalar"],
        packed_integer=total["integer"],
        float64=total["float64"],
        matrix=total["matrix"],
        libm={name[5:]: count for name, count in sorted(total.items()) if name.startswith("libm ")},
        loops=tuple(loops),
        notes=tuple(notes),
    )
