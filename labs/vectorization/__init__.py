"""What is vectorization?

Short answer: doing the same operation on many numbers at once. It has two meanings that are often confused.
For a Python user it is replacing the interpreter's loop by one call of a compiled loop; for the CPU it is
one instruction on a register of 4 to 16 numbers (SIMD). A compiled loop is not SIMD by itself: a sum whose
order may not change, a call of a library function, a branch, or memory that might overlap keeps it scalar.

Four problems are climbed rung by rung: Python, numpy, numba as it comes, numba with what SIMD needs, all
cores, JAX (jit, vmap), torch (eager, compiled). Every rung computes the same thing, checked against
float64.

Formulas, as code in ``predict`` of each problem, which has some of the terms:
  Python   operations, items, calls of C and turns of a loop, each x its own time
  numpy    passes x bytes / bandwidth at the working set + new pages + calls + inner loops x a start
             + elements x time of exp, or of a conversion
  numba    a chain of dependent operations x latency + calls of the C library x their time
  SIMD     instructions x time of one of exp's + divisions x their time + sums across lanes
             + bytes / bandwidth
  parallel SIMD / cores + parallel regions
What the compiler made is read from the machine code (kernels/inspect.py) and recorded with each numba rung.

Sources: Hennessy and Patterson, Computer Architecture, chapter 4 (SIMD); Williams, Waterman, Patterson,
Roofline, CACM 52(4) 2009; Agner Fog, Optimizing software in C++, chapter 12, and instruction tables; Intel
64 and IA-32 Optimization Reference Manual, chapter 18; the problems' own are in their files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labs.lab import Check, Lab, Prediction, Variant, setting
from labs.machine import Machine
from labs.vectorization import black_scholes, floyd_warshall, mandelbrot, pairwise
from labs.vectorization.picture import figure

PROBLEMS = (pairwise, black_scholes, mandelbrot, floyd_warshall)


@dataclass(frozen=True)
class Config:
    """Sizes of the four problems. Pure Python runs them in full, which is what bounds them."""

    points: int = setting(
        512, unit="points", help="pairwise: number of points", quick=384, full=1024, minimum=1
    )
    dimensions: int = setting(64, unit="numbers", help="pairwise: coordinates of a point", minimum=1)
    options: int = setting(
        500_000, unit="options", help="Black-Scholes: options", quick=200_000, full=4_000_000, minimum=1
    )
    pixels: int = setting(
        512, unit="pixels", help="Mandelbrot: side of the picture", quick=256, full=1024, minimum=1
    )
    iterations: int = setting(100, unit="steps", help="Mandelbrot: steps at most", full=200, minimum=1)
    nodes: int = setting(
        256, unit="nodes", help="Floyd-Warshall: nodes of the graph", quick=160, full=512, minimum=1
    )
    compile: bool = setting(
        True, unit="", help="Black-Scholes: also torch.compile, 10 to 40 s to compile once"
    )


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    return [prediction for problem in PROBLEMS for prediction in problem.predict(config, machine)]


def variants(config: Config) -> Sequence[Variant]:
    return [variant for problem in PROBLEMS for variant in problem.variants(config)]


def check(config: Config, outputs: Mapping[str, object]) -> Sequence[Check]:
    groups = {address.partition("/")[0] for address in outputs}
    return [
        item for problem in PROBLEMS if problem.GROUP in groups for item in problem.check(config, outputs)
    ]


def memory_bytes(config: Config) -> float:
    """The largest problem's arrays and temporaries; lists of Python floats take 32 bytes an item."""
    cube = 2 * 4.0 * config.points**2 * config.dimensions
    return max(
        cube + 64.0 * config.points**2,
        32.0 * 5 * config.options + 15 * 4.0 * config.options,
        (32.0 + 60.0) * config.pixels**2,
        (32.0 + 16.0) * config.nodes**2,
    )


LAB = Lab(
    name="vectorization",
    question="What is vectorization?",
    answer=(
        "Doing one operation on many numbers at once: a compiled loop in place of the interpreter's, and in "
        "that loop one instruction for 4 to 16 numbers (SIMD). Compiling alone does not give SIMD: a sum in "
        "fixed order, a call of the C library, a branch or memory that may overlap keep a loop scalar, and "
        "each has its remedy. A better algorithm is worth more than all of them."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=tuple(claim for problem in PROBLEMS for claim in problem.CLAIMS),
    figure=figure,
    memory_bytes=memory_bytes,
    columns=("default", "tuned"),
    seconds=6.0,
    sources=(
        "Hennessy and Patterson, Computer Architecture, chapter 4",
        "Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009",
        "Agner Fog, Optimizing software in C++ and instruction tables, agner.org/optimize",
        "numba documentation, Performance Tips (fastmath, SVML)",
    ),
)

__all__ = ["LAB", "Config"]
