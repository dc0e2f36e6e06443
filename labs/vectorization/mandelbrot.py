"""Mandelbrot escape times: each step needs the last, so SIMD must go across pixels.

z = z*z + c from z = 0, counted while |z| <= 2, at most ``iterations`` times, for each c of a square grid over
[-2, 0.6] x [-1.2, 1.2]. 8 operations a step; ``flops`` counts the steps that pixels need, no more. Lanes
that have escaped go on idle until the last of their block has: the price of SIMD on work of uneven length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from labs import packed_code
from labs.lab import Check, Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.vectorization import rungs

GROUP = "mandelbrot"
STEP_FLOPS = 8
BLOCK = 64  # as in mandelbrot_numba, which a prediction must not import


def plane(config: Any) -> tuple[Any, Any]:
    """Real parts of the columns and imaginary parts of the rows, float32."""
    import numpy as np

    return (
        np.linspace(-2.0, 0.6, config.pixels).astype(np.float32),
        np.linspace(-1.2, 1.2, config.pixels).astype(np.float32),
    )


@lru_cache(maxsize=2)
def _reference(pixels: int, iterations: int, every: int = 1) -> Any:
    """Counts in float64 for every so manieth row, escaped pixels dropped as they escape."""
    import numpy as np

    real = np.linspace(-2.0, 0.6, pixels).astype(np.float32).astype(np.float64)
    imaginary = np.linspace(-1.2, 1.2, pixels).astype(np.float32).astype(np.float64)[::every]
    c = (real[None, :] + 1j * imaginary[:, None]).ravel()
    counts = np.zeros(c.size, np.int32)
    left, z = np.arange(c.size), np.zeros_like(c)
    for _ in range(iterations):
        inside = z.real * z.real + z.imag * z.imag <= 4
        left, z = left[inside], z[inside]
        counts[left] += 1
        z = z * z + c[left]
    return counts.reshape(imaginary.size, pixels)


def python(config: Any, recorder: Recorder) -> Step:
    columns, rows = (values.tolist() for values in plane(config))
    iterations = config.iterations

    def step() -> list[list[int]]:
        counts = []
        for height in rows:
            line = []
            for width in columns:
                x = y = 0.0
                count = iterations
                for k in range(iterations):
                    xx, yy = x * x, y * y
                    if xx + yy > 4.0:
                        count = k
                        break
                    y = (x + x) * y + height
                    x = xx - yy + width
                line.append(count)
            counts.append(line)
        return counts

    return step


def numpy(config: Any, recorder: Recorder) -> Step:
    """All pixels at every step, whether they have escaped or not."""
    import numpy as np

    real, imaginary = plane(config)

    def step() -> Any:
        x = np.zeros((imaginary.size, real.size), np.float32)
        y, counts = np.zeros_like(x), np.zeros(x.shape, np.int32)
        with np.errstate(over="ignore", invalid="ignore"):  # escaped pixels go through inf to NaN
            for _ in range(config.iterations):
                xx, yy = x * x, y * y
                counts += xx + yy <= 4
                y = (x + x) * y + imaginary[:, None]
                x = xx - yy + real
        return counts

    return step


NUMPY_PASSES, NUMPY_BYTES = 10, 4 * (2 + 2 + 3 + 1.25 + 2.25 + 2 + 3 + 2 + 3 + 2)  # per pixel and step


def numpy_compact(config: Any, recorder: Recorder) -> Step:
    """Only pixels that are left: the arrays shrink from step to step."""
    import numpy as np

    real, imaginary = plane(config)

    def step() -> Any:
        counts = np.zeros(imaginary.size * real.size, np.int32)
        left = np.arange(counts.size)
        width, height = np.tile(real, imaginary.size), np.repeat(imaginary, real.size)
        x, y = np.zeros_like(width), np.zeros_like(width)
        for _ in range(config.iterations):
            xx, yy = x * x, y * y
            inside = xx + yy <= 4
            if not inside.all():
                left, width, height = left[inside], width[inside], height[inside]
                x, y, xx, yy = x[inside], y[inside], xx[inside], yy[inside]
            counts[left] += 1
            y = (x + x) * y + height
            x = xx - yy + width
        return counts.reshape(imaginary.size, real.size)

    return step


def numba(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import mandelbrot_numba as kernel

    arguments = (*plane(config), config.iterations)
    return rungs.Compiled(recorder, kernel.plain, arguments)


def numba_simd(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import mandelbrot_numba as kernel

    arguments = (*plane(config), config.iterations)
    return rungs.Compiled(recorder, kernel.simd, arguments)


def numba_parallel(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import mandelbrot_numba as kernel

    arguments = (*plane(config), config.iterations)
    return lambda: kernel.parallel(*arguments)


def jax(config: Any, recorder: Recorder) -> Step:
    """The numpy program under jit: XLA fuses a step's ten operations into one pass."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def counts_of(real: Any, imaginary: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            x, y, counts = state
            xx, yy = x * x, y * y
            counts = counts + (xx + yy <= 4)
            return xx - yy + real, (x + x) * y + imaginary[:, None], counts

        zeros = jnp.zeros((imaginary.size, real.size), jnp.float32)
        return jax.lax.fori_loop(0, config.iterations, step, (zeros, zeros, zeros.astype(jnp.int32)))[2]

    arguments = tuple(map(jnp.asarray, plane(config)))
    return lambda: counts_of(*arguments)


def jax_vmap(config: Any, recorder: Recorder) -> Step:
    """Written for one pixel with a while loop; under vmap it runs until the last pixel has ended."""
    import jax
    import jax.numpy as jnp

    def pixel(width: Any, height: Any) -> Any:
        def going(state: Any) -> Any:
            x, y, count = state
            return (x * x + y * y <= 4) & (count < config.iterations)

        def step(state: Any) -> Any:
            x, y, count = state
            return x * x - y * y + width, (x + x) * y + height, count + 1

        zero = jnp.float32(0)
        return jax.lax.while_loop(going, step, (zero, zero, jnp.int32(0)))[2]

    counts_of = jax.jit(jax.vmap(jax.vmap(pixel, (0, None)), (None, 0)))
    arguments = tuple(map(jnp.asarray, plane(config)))
    return lambda: counts_of(*arguments)


def torch(config: Any, recorder: Recorder) -> Step:
    import torch

    real, imaginary = map(torch.from_numpy, plane(config))

    def step() -> Any:
        with torch.inference_mode():
            x = torch.zeros(imaginary.numel(), real.numel())
            y, counts = torch.zeros_like(x), torch.zeros(x.shape, dtype=torch.int32)
            for _ in range(config.iterations):
                xx, yy = x * x, y * y
                counts += xx + yy <= 4
                y = (x + x) * y + imaginary[:, None]
                x = xx - yy + real
            return counts

    return step


def variants(config: Any) -> Sequence[Variant]:
    pixels = float(config.pixels**2)
    array = rungs.FLOAT_BYTES * pixels

    def one(name: str, setup: Any, package: str, arrays: float = 1.0, **rest: Any) -> Variant:
        return Variant(
            GROUP,
            name,
            setup,
            # A sample, so that listing variants stays cheap: every eighth row.
            flops=STEP_FLOPS * pixels * _mean_steps(config),
            bytes_moved=array,
            working_set=arrays * array,
            unavailable=rungs.missing(package) if package else "",
            **rest,
        )

    return [
        one("python", python, "", dtype="float64"),
        one("numpy", numpy, "numpy", 7),
        one("numpy_compact", numpy_compact, "numpy", 7),
        one("numba", numba, "numba"),
        one("numba_simd", numba_simd, "numba"),
        one("numba_parallel", numba_parallel, "numba", threads=0),
        one("jax", jax, "jax", 3, threads=0, clock="jax"),
        one("jax_vmap", jax_vmap, "jax", 3, threads=0, clock="jax"),
        one("torch", torch, "torch", 7, threads=0),
    ]


def _sample(config: Any) -> Any:
    return _reference(config.pixels, config.iterations, max(1, config.pixels // 32))


def _mean_steps(config: Any) -> float:
    return float(_sample(config).mean())


def predict(config: Any, machine: Machine) -> Sequence[Prediction]:
    import numpy as np

    pixels, iterations = float(config.pixels**2), config.iterations
    sample = _sample(config)
    steps = pixels * float(sample.mean())
    array = rungs.FLOAT_BYTES * pixels
    found = []

    def say(name: str, seconds: float, because: str, suspect: str = "") -> None:
        found.append(Prediction(f"{GROUP}/{name}", "time_s", seconds, because, suspect))

    operation, turn = machine["python_operation_s"], machine["python_step_s"]
    say(
        "python",
        steps * (9 * operation + turn),
        f"{steps:.3g} steps (counted on 32 rows) x (9 operations x {operation * 1e9:.3g} ns + a turn of the "
        f"loop {turn * 1e9:.3g} ns)",
        "an interpreter that treats comparison unlike arithmetic",
    )
    moved = rungs.pass_seconds(machine, iterations * NUMPY_BYTES * pixels, 7 * array)
    calls = iterations * NUMPY_PASSES * machine["numpy_call_s"]
    converted = iterations * pixels * machine["numpy_conversion_s"]
    say(
        "numpy",
        moved + calls + converted,
        f"{iterations} steps x {NUMPY_PASSES} passes over {array / 1e6:.3g} MB: {rungs.milliseconds(moved)}, "
        f"calls {rungs.milliseconds(calls)}, truth values added to integers {rungs.milliseconds(converted)}",
        "the conversion of truth values, piece by piece",
    )
    product, addition = machine["fma_latency_s"], machine["add_latency_s"]
    say(
        "numba",
        steps * (product + 2 * addition),
        f"{steps:.3g} steps x a chain of a product {product * 1e9:.3g} ns and two additions "
        f"{addition * 1e9:.3g} ns",
        "a mispredicted exit per pixel",
    )
    width = min(BLOCK, config.pixels)
    starts = np.arange(0, config.pixels, width)
    longest = np.minimum(np.maximum.reduceat(sample, starts, axis=1) + 1, iterations)
    lanes_stepped = float((longest * np.diff([*starts, config.pixels])).sum()) * config.pixels / len(sample)
    # 3 products and 5 sums in 7 instructions where fused; comparison, selection, count, maximum.
    instructions = 7 + 4
    tests = lanes_stepped / width * packed_code.across_lanes_seconds(machine)
    packed = packed_code.instruction_seconds(machine, instructions, lanes_stepped) + tests
    say(
        "numba_simd",
        packed,
        f"{lanes_stepped:.3g} steps (a block of {width} goes on to its last) x {instructions} "
        "instructions over "
        f"{machine['vector_lanes_float32']:.0f} lanes, and whether one is left {rungs.milliseconds(tests)}",
        "one store a cycle; a test that does not wait for the one before",
    )
    say(
        "numba_parallel",
        rungs.shared_seconds(machine, packed) + machine["numba_call_s"],
        f"{rungs.milliseconds(packed)} / {machine.cores} cores + one parallel region",
        "rows of uneven length: a core that gets the middle of the picture ends last",
    )
    split = rungs.pass_seconds(machine, iterations * NUMPY_BYTES * pixels, 7 * array, threads=0)
    start = machine["torch_call_s"] + (machine.get("torch_parallel_region_s") or 0.0)
    say(
        "torch",
        split + iterations * (NUMPY_PASSES + 1) * start,
        f"{iterations} steps x {NUMPY_PASSES} operations on all cores: {rungs.milliseconds(split)}, each "
        f"{start * 1e6:.3g} us to start",
        "temporaries that malloc gives back and takes anew (compare the allocator columns)",
    )
    return found


def check(config: Any, outputs: Mapping[str, object]) -> Sequence[Check]:
    import numpy as np

    expected = _reference(config.pixels, config.iterations)

    def error(values: Any) -> float:
        return float(np.mean(values != expected))

    # Near the boundary the orbit is chaotic: a rounding in the 24th bit decides at which step it escapes.
    return rungs.compare(
        outputs,
        GROUP,
        error,
        expected.shape,
        0.01,
        "float64 counts: share of pixels that differ (boundary only)",
    )


CLAIMS = (
    rungs.faster_claim(
        "Across pixels SIMD pays although pixels end at different times: at least 2x the plain compiled "
        "loop.",
        f"{GROUP}/numba_simd",
        f"{GROUP}/numba",
        2,
        "One pixel's steps form a chain of dependent operations; a core waits for each. Many pixels at once "
        "fill the lanes and the waiting. Lanes of escaped pixels idle, which costs less than it gains.",
    ),
    rungs.faster_claim(
        "The compiled loop is at least 10x pure Python.",
        f"{GROUP}/numba",
        f"{GROUP}/python",
        10,
        "The same loop without an interpreter: no objects, no dispatch on types. Not SIMD yet.",
    ),
)
