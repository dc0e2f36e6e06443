"""Floyd-Warshall: SIMD code that is compiled and never run, and cores that must meet n times.

distance[i, j] = min(distance[i, j], distance[i, k] + distance[k, j]) for k = 0 ... n-1 (Floyd 1962), 2 n**3
operations. The textbook loop reads and writes one matrix: row k might be row i, and distance[i, k] lies in
the row that is written. The compiler makes SIMD code and guards it with a test that the memory does not
overlap; here it always does, so the scalar loop runs. A copy of row k, and a minimum without a branch,
remove the doubt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labs.lab import Check, Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.vectorization import rungs

GROUP = "floyd_warshall"


def weights(config: Any) -> Any:
    """(n, n) float32, a complete directed graph, lengths skewed so that many shortest paths have detours."""
    import numpy as np

    lengths = np.random.default_rng(4).exponential(10.0, (config.nodes, config.nodes)).astype(np.float32)
    np.fill_diagonal(lengths, 0)
    return lengths


def python(config: Any, recorder: Recorder) -> Step:
    rows = weights(config).tolist()
    nodes = range(config.nodes)

    def step() -> list[list[float]]:
        distance = [row[:] for row in rows]
        for k in nodes:
            via = distance[k]
            for row in distance:
                first = row[k]
                for j in nodes:
                    through = first + via[j]
                    if through < row[j]:
                        row[j] = through
        return distance

    return step


def numpy(config: Any, recorder: Recorder) -> Step:
    import numpy as np

    start = weights(config)

    def step() -> Any:
        distance, through = start.copy(), np.empty_like(start)
        for k in range(config.nodes):
            np.add(distance[:, k, None], distance[k], out=through)
            np.minimum(distance, through, out=distance)
        return distance

    return step


def numba(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import floyd_warshall_numba as kernel

    start = weights(config)
    return rungs.Compiled(recorder, kernel.plain, (start,))


def numba_simd(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import floyd_warshall_numba as kernel

    start = weights(config)
    return rungs.Compiled(recorder, kernel.simd, (start,))


def numba_parallel(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import floyd_warshall_numba as kernel

    start = weights(config)
    return lambda: kernel.parallel(start)


def jax(config: Any, recorder: Recorder) -> Step:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def shortest(distance: Any) -> Any:
        def step(k: Any, distance: Any) -> Any:
            return jnp.minimum(distance, distance[:, k, None] + distance[k])

        return jax.lax.fori_loop(0, distance.shape[0], step, distance)

    start = jnp.asarray(weights(config))
    return lambda: shortest(start)


def torch(config: Any, recorder: Recorder) -> Step:
    import torch

    start = torch.from_numpy(weights(config))

    def step() -> Any:
        with torch.inference_mode():
            distance, through = start.clone(), torch.empty_like(start)
            for k in range(config.nodes):
                torch.add(distance[:, k, None], distance[k], out=through)
                torch.minimum(distance, through, out=distance)
            return distance

    return step


def variants(config: Any) -> Sequence[Variant]:
    matrix = float(rungs.FLOAT_BYTES * config.nodes**2)

    def one(name: str, setup: Any, package: str, matrices: float = 1.0, **rest: Any) -> Variant:
        return Variant(
            GROUP,
            name,
            setup,
            flops=2.0 * config.nodes**3,
            bytes_moved=2 * matrix,
            working_set=(matrices + 1) * matrix,
            unavailable=rungs.missing(package) if package else "",
            **rest,
        )

    return [
        one("python", python, "", dtype="float64"),
        one("numpy", numpy, "numpy", 2),
        one("numba", numba, "numba"),
        one("numba_simd", numba_simd, "numba"),
        one("numba_parallel", numba_parallel, "numba", threads=0),
        one("jax", jax, "jax", 2, threads=0, clock="jax"),
        one("torch", torch, "torch", 2, threads=0),
    ]


def predict(config: Any, machine: Machine) -> Sequence[Prediction]:
    n = config.nodes
    cube, matrix = float(n) ** 3, float(rungs.FLOAT_BYTES * n * n)
    found = []

    def say(name: str, seconds: float, because: str, suspect: str = "") -> None:
        found.append(Prediction(f"{GROUP}/{name}", "time_s", seconds, because, suspect))

    operation, item, turn = (machine[f"python_{name}_s"] for name in ("operation", "item", "step"))
    say(
        "python",
        cube * (2 * operation + 2 * item + turn),
        f"{cube:.3g} x (addition and comparison x {operation * 1e9:.3g} ns + 2 items x {item * 1e9:.3g} ns + "
        f"a turn of the loop {turn * 1e9:.3g} ns)",
        "an interpreter that treats comparison unlike arithmetic",
    )
    moved = rungs.pass_seconds(machine, n * 4 * matrix, 2 * matrix)
    calls = 2 * n * machine["numpy_call_s"]
    starts = n * n * machine["numpy_broadcast_row_s"]
    say(
        "numpy",
        moved + calls + starts,
        f"{n} steps write {matrix / 1e3:.3g} kB of sums, then read two and write one: "
        f"{rungs.milliseconds(moved)}, "
        f"calls {rungs.milliseconds(calls)}, {n * n} rows with a number each {rungs.milliseconds(starts)}",
        f"rows of {n} elements, for each of which numpy starts its loop anew",
    )
    # A line that is updated in place comes and goes; of a copy's two lines the target's comes, too, only
    # to be overwritten: two transfers for what a copy does in three.
    rows = rungs.pass_seconds(machine, n * 2 * matrix, matrix) * 2 / 3
    say(
        "numba_simd",
        rows + machine["numba_call_s"],
        f"{n} steps read and write {matrix / 1e3:.3g} kB in place (2/3 of a copy's time), row k staying in "
        "the nearest cache",
        f"rows of {n}: what is left over after full registers, and starting each row",
    )
    say(
        "numba_parallel",
        rungs.shared_seconds(machine, rows, n) + machine["numba_call_s"],
        f"{rungs.milliseconds(rows)} / {machine.cores} cores + {n} parallel regions x "
        f"{machine['numba_parallel_region_s'] * 1e6:.3g} us",
        "threads that do not get a core at once: every step waits for the last of them",
    )
    threads = 0 if n * n > 32768 else 1  # below torch's grain size an operation is not split
    split = rungs.pass_seconds(machine, n * 4 * matrix, 2 * matrix, threads=threads)
    start = machine["torch_call_s"]
    if threads == 0:
        start += 0.5 * (machine.get("torch_parallel_region_s") or 0.0)  # two of the four
    say(
        "torch",
        split + 4 * n * start,
        f"{n} steps x 4 operations (2 views, add, minimum) x {start * 1e6:.3g} us, "
        f"{rungs.milliseconds(split)} of passes",
        "views, which cost less or more than the operation the constant was measured on",
    )
    return found


def check(config: Any, outputs: Mapping[str, object]) -> Sequence[Check]:
    import numpy as np

    expected = weights(config).astype(np.float64)
    for k in range(config.nodes):
        np.minimum(expected, expected[:, k, None] + expected[k], out=expected)
    scale = np.where(expected > 0, expected, 1)

    def error(values: Any) -> float:
        return float(np.max(np.abs(values.astype(np.float64) - expected) / scale))

    # A shortest path is a sum of at most n - 1 lengths, in any order.
    return rungs.compare(
        outputs,
        GROUP,
        error,
        expected.shape,
        config.nodes * rungs.ROUNDING,
        "float64, relative to the distance",
    )


CLAIMS = (
    rungs.faster_claim(
        "Without the doubt about overlapping rows, and without the branch, the compiled loop is at least 2x "
        "as fast.",
        f"{GROUP}/numba_simd",
        f"{GROUP}/numba",
        2,
        "The plain loop's machine code may contain SIMD, but behind a test that row k and row i do not "
        "overlap, made once for the whole matrix: it always fails, and the scalar loop runs. What a listing "
        "shows is what was compiled, not what runs: compare the recorded register width with the time.",
    ),
)
