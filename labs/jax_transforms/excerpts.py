"""Lines of compiled programs that explain what surprises: a text beside the variant whose program it is.

An excerpt is made from the lowered and the compiled program of a ``staging.Staged`` step, when that is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WIDTH = 150  # characters of a line that are kept: types and names come first


@dataclass(frozen=True)
class Excerpt:
    """title: what it is of. explains: the surprise. lines: of the lowered and the compiled program."""

    title: str
    explains: str
    lines: Callable[[Any, Any], str]


def telling(hlo: str, *words: str, most: int = 6) -> str:
    """The lines with one of the words, cut to their beginnings; how many more there are."""
    lines = [line.strip() for line in hlo.splitlines() if any(word in line for word in words)]
    shown = [f"{line[:WIDTH]} ..." if len(line) > WIDTH else line for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"... and {len(lines) - most} more such lines")
    return "\n".join(shown) or f"(no line has {' or '.join(words)})"


def _aliases(lowered: Any, program: Any) -> str:
    hlo = program.as_text()
    begin = hlo.find("input_output_alias")
    line = hlo[begin : hlo.find("}, entry", begin) + 1] if begin >= 0 else "(no input_output_alias)"
    return line[: 4 * WIDTH]


def _barriers(lowered: Any, program: Any) -> str:
    """How many products and barriers there are, before and after XLA."""
    before, after = lowered.as_text(), program.as_text()
    rows = (
        ("", "products", "barriers"),
        ("lowered", before.count("stablehlo.dot_general"), before.count("optimization_barrier")),
        ("compiled", after.count(" dot("), after.count("opt-barrier")),
    )
    return "\n".join(f"{name:10}{products:>10}{barriers:>10}" for name, products, barriers in rows)


def _loop(lowered: Any, program: Any) -> str:
    return telling(lowered.as_text(), "stablehlo.while", "stablehlo.dot_general", most=4)


BATCHED = Excerpt(
    "vmap of a product (HLO)",
    "No loop: vmap turned the product into one with a batch dimension.",
    lambda lowered, program: telling(program.as_text(), " dot("),
)
DONATED = Excerpt(
    "A donated training step (HLO, first line)",
    "Output 1 is argument 0's memory and so on: the new parameters are written over the old ones.",
    _aliases,
)
PLAIN = Excerpt("A training step, before and after XLA", "To compare with jax.checkpoint's.", _barriers)
CHECKPOINT = Excerpt(
    "jax.checkpoint of an MLP's layers, before and after XLA",
    "Lowered, the layers' products are there again behind barriers; compiled for a CPU, the barriers are "
    "gone and each product is computed once. It saves no memory here and costs some: see the picture.",
    _barriers,
)
LOOPS = {
    "scan": Excerpt(
        "Recurrent steps: scan (StableHLO)",
        "One while loop: its body is compiled once, whatever the number of steps.",
        _loop,
    ),
    "unrolled": Excerpt(
        "Recurrent steps: unrolled (StableHLO)",
        "Every step has products and kernels of its own: that is what takes long to compile.",
        _loop,
    ),
}


def interpreted(side: int) -> Excerpt:
    """side: rows and columns of the scores."""
    return Excerpt(
        "A Pallas kernel in interpret mode (HLO)",
        "The grid is a while loop. Its turn copies all the scores twice, for the sake of one block: that is "
        "what takes the time.",
        lambda lowered, program: telling(
            program.as_text(), f"f32[{side},{side}]{{1,0}} copy(", " while(", most=8
        ),
    )
