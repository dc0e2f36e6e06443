"""Pairwise distances: a sum that may not be reordered, and an algorithm that beats every compiler.

distance[i, j] = sqrt(sum over k of (points[i, k] - points[j, k])**2), 3 n**2 d operations. By |x - y|**2 =
|x|**2 + |y|**2 - 2 x.y it is a matrix product (2 n**2 d, through BLAS) and a few passes over n**2. The
product form cancels for close points: what is bounded is the error of the *squared* distance, relative to
|x|**2 + |y|**2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labs import packed_code
from labs.lab import Check, Claim, Prediction, Recorder, Results, Step, Variant, all_of, at_least
from labs.machine import Machine
from labs.vectorization import rungs

GROUP = "pairwise"


def points(config: Any) -> Any:
    """(n, d) float32, standard normal, the same at each call."""
    import numpy as np

    return np.random.default_rng(1).standard_normal((config.points, config.dimensions), dtype=np.float32)


def python(config: Any, recorder: Recorder) -> Step:
    rows = points(config).tolist()

    def step() -> list[list[float]]:
        out = []
        for left in rows:
            line = []
            for right in rows:
                total = 0.0
                for a, b in zip(left, right, strict=True):
                    difference = a - b
                    total += difference * difference
                line.append(math.sqrt(total))
            out.append(line)
        return out

    return step


def numpy(config: Any, recorder: Recorder) -> Step:
    import numpy as np

    x = points(config)
    return lambda: np.sqrt(((x[:, None, :] - x[None, :, :]) ** 2).sum(axis=-1))


def numpy_gram(config: Any, recorder: Recorder) -> Step:
    import numpy as np

    x = points(config)

    def step() -> Any:
        squares = (x * x).sum(axis=1)
        return np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * (x @ x.T), 0))

    return step


def numba(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import pairwise_numba as kernel

    x = points(config)
    return rungs.Compiled(recorder, kernel.plain, (x,))


def numba_simd(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import pairwise_numba as kernel

    x = points(config)
    return rungs.Compiled(recorder, kernel.simd, (x,))


def numba_parallel(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import pairwise_numba as kernel

    x = points(config)
    return lambda: kernel.parallel(x)


def jax_vmap(config: Any, recorder: Recorder) -> Step:
    """Written for one pair; vmap adds an axis to either argument, jit compiles the whole."""
    import jax
    import jax.numpy as jnp

    def distance(left: Any, right: Any) -> Any:
        return jnp.sqrt(jnp.sum((left - right) ** 2))

    x = jnp.asarray(points(config))
    pairs = jax.jit(jax.vmap(jax.vmap(distance, (None, 0)), (0, None)))
    return lambda: pairs(x, x)


def torch(config: Any, recorder: Recorder) -> Step:
    import torch

    x = torch.from_numpy(points(config))

    def step() -> Any:
        with torch.inference_mode():
            return torch.cdist(x, x)

    return step


def variants(config: Any) -> Sequence[Variant]:
    n, d = config.points, config.dimensions
    plain, gram = 3.0 * n * n * d, 2.0 * n * n * d + 4.0 * n * n
    bytes_moved = rungs.FLOAT_BYTES * (n * d + n * n)
    cube = rungs.FLOAT_BYTES * n * n * d  # the differences of all pairs, where they are written down

    def one(name: str, setup: Any, flops: float, package: str, extra: float = 0.0, **rest: Any) -> Variant:
        return Variant(
            GROUP,
            name,
            setup,
            flops=flops,
            bytes_moved=bytes_moved,
            working_set=bytes_moved + extra,
            unavailable=rungs.missing(package) if package else "",
            **rest,
        )

    return [
        one("python", python, plain, "", dtype="float64"),
        one("numpy", numpy, plain, "numpy", 2 * cube),
        one("numpy_gram", numpy_gram, gram, "numpy", threads=0),
        one("numba", numba, plain, "numba"),
        one("numba_simd", numba_simd, plain, "numba"),
        one("numba_parallel", numba_parallel, plain, "numba", threads=0),
        one("jax_vmap", jax_vmap, plain, "jax", threads=0, clock="jax"),
        one("torch", torch, gram, "torch", threads=0),
    ]


def predict(config: Any, machine: Machine) -> Sequence[Prediction]:
    n, d = config.points, config.dimensions
    pairs, terms = float(n * n), float(n * n * d)
    lanes = machine["vector_lanes_float32"]
    found = []

    def say(name: str, seconds: float, because: str, suspect: str = "") -> None:
        found.append(Prediction(f"{GROUP}/{name}", "time_s", seconds, because, suspect))

    operation, item, turn = (machine[f"python_{name}_s"] for name in ("operation", "item", "step"))
    say(
        "python",
        terms * (3 * operation + 2 * item + turn),
        f"{terms:.3g} terms x (subtract, multiply, add x {operation * 1e9:.3g} ns + 2 items x "
        f"{item * 1e9:.3g} ns + a turn of the loop {turn * 1e9:.3g} ns)",
        "zip, which makes a pair of the items",
    )
    cube = rungs.FLOAT_BYTES * terms
    moved = rungs.pass_seconds(machine, 4 * cube, 2 * cube)
    fresh = rungs.fresh_seconds(machine, cube, 2)
    starts = rungs.inner_loop_seconds(machine, 2 * pairs)
    say(
        "numpy",
        moved + fresh + starts,
        f"writes {cube / 1e6:.3g} MB of differences, squares them, sums them: 4 x {cube / 1e6:.3g} MB in "
        f"{rungs.milliseconds(moved)}, new pages {rungs.milliseconds(fresh)}, {2 * pairs:.3g} inner loops "
        f"{rungs.milliseconds(starts)}",
        f"inner loops of {d} elements, whose start weighs; and huge pages, which numpy asks for",
    )
    small, flops = rungs.FLOAT_BYTES * pairs, 2 * terms
    product = flops / machine.product_rate(flops, threads=0, library="numpy")
    passes = rungs.pass_seconds(machine, 10 * small, 3 * small) + n * machine["numpy_broadcast_row_s"]
    root = (
        pairs * machine["numpy_exp_s"]
    )  # the divider takes about as long for a root as arithmetic for an exp
    say(
        "numpy_gram",
        product + passes + root + 9 * machine["numpy_call_s"],
        f"2 n^2 d flops at the rate of a square product {rungs.milliseconds(product)}, 10 passes over n^2 "
        f"{rungs.milliseconds(passes)}, the root {rungs.milliseconds(root)}",
        "a product this thin; numpy computes half of a matrix times its own transpose, and copies that",
    )
    chain = terms * machine["add_latency_s"]
    say(
        "numba",
        chain,
        f"{terms:.3g} additions, each waiting for the last: x {machine['add_latency_s'] * 1e9:.3g} ns",
        "neighbouring pairs computed at once",
    )
    # Per pair: a subtraction and an FMA a register; then the lanes are added to one another, and a root.
    instructions = 2 * math.ceil(d / lanes) + 2 * math.log2(lanes) + 4
    packed = packed_code.instruction_seconds(machine, instructions * lanes, pairs)
    say(
        "numba_simd",
        packed,
        f"{pairs:.3g} pairs x {instructions:.0f} instructions of {lanes:.0f} lanes",
        "the sum over lanes at the end of each pair, which waits for itself",
    )
    say(
        "numba_parallel",
        rungs.shared_seconds(machine, packed) + machine["numba_call_s"],
        f"{rungs.milliseconds(packed)} / {machine.cores} cores + one parallel region",
        "cores that are busy or that share one core's execution units (hyper-threads)",
    )
    two = rungs.pass_seconds(machine, 4 * small, 2 * small, threads=0)
    product = flops / machine.product_rate(flops, threads=0)
    say(
        "torch",
        product * (d + 2) / d + two + root / machine.cores + 12 * machine["torch_call_s"],
        f"cdist is a matrix product too {rungs.milliseconds(product)}, then clamp and root "
        f"{rungs.milliseconds(two)}, "
        f"12 operations inside",
        "a BLAS that is far below the peak for a product this thin",
    )
    return found


def check(config: Any, outputs: Mapping[str, object]) -> Sequence[Check]:
    import numpy as np

    x = points(config).astype(np.float64)
    lengths = (x * x).sum(axis=1)
    scale = lengths[:, None] + lengths[None, :]
    expected = np.stack([((row - x) ** 2).sum(axis=1) for row in x])

    def error(values: Any) -> float:
        return float(np.max(np.abs(values.astype(np.float64) ** 2 - expected) / scale))

    # Sums of d rounded terms, each at most twice the scale in all (Higham 2002, section 3.1).
    tolerance = 2 * (config.dimensions + 4) * rungs.ROUNDING
    return rungs.compare(
        outputs,
        GROUP,
        error,
        expected.shape,
        tolerance,
        "squared distances in float64, relative to |x|^2 + |y|^2",
    )


def _reordering(results: Results) -> bool | None:
    plain, simd = (rungs.vector_bits(results, f"{GROUP}/{name}") for name in ("numba", "numba_simd"))
    if plain is None or simd is None:
        return None
    faster = rungs.times_faster(results, f"{GROUP}/numba_simd", f"{GROUP}/numba", 2)
    return all_of(plain == 0, simd >= 128, faster)


def _algorithm(results: Results) -> bool | None:
    names = [f"{GROUP}/{name}" for name in ("numpy_gram", "numpy", "numba")]
    if not results.has(*names):
        return None
    gram, cube, compiled = names
    return all_of(at_least(results.ratio(cube, gram), 3), at_least(results.ratio(compiled, gram), 2))


CLAIMS = (
    Claim(
        "A compiled sum is scalar; allowed to reorder the additions, the same source becomes SIMD and at "
        "least twice as fast.",
        _reordering,
        "Floating-point addition is not associative, so the compiler must add in the order written, one "
        "number after the other, each addition waiting for the last. fastmath={'reassoc', ...} lifts that.",
    ),
    Claim(
        "A better algorithm beats a better compiler: numpy with the Gram matrix is at least 3x numpy "
        "without, and 2x the compiled loop.",
        _algorithm,
        "The Gram form never writes the n x n x d differences down, and spends its operations in BLAS, "
        "which keeps a block of the result in registers. When it fails, look at which BLAS numpy uses "
        "(numpy.show_config()).",
    ),
)
