"""Black-Scholes option prices: a formula of five transcendental functions, the same for each of n options.

With upper = (ln(S/K) + (r + v**2/2) T) / (v sqrt T) and lower = upper - v sqrt T,
call = S N(upper) - K exp(-r T) N(lower) and, by parity, put = call - S + K exp(-r T)
(Black and Scholes 1973). Errors are relative to the strike K.

``flops`` counts every arithmetic operation of kernels/simd.py's polynomials, for all rungs alike: what one
option costs when nothing is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labs import packed_code
from labs.lab import Check, Claim, Prediction, Recorder, Results, Step, Variant, all_of, values_of
from labs.machine import Machine
from labs.vectorization import rungs

GROUP = "black_scholes"
RATE, VOLATILITY = 0.03, 0.25  # a year, and a root of a year

# Operations in kernels/simd.py. Arithmetic: additions, multiplications (two in an FMA), divisions, roots.
EXP_FLOPS, LOG_FLOPS, ERF_FLOPS = 20, 24, 28 + 20
OPTION_FLOPS = LOG_FLOPS + EXP_FLOPS + 2 * (ERF_FLOPS + 3) + 17
# Instructions but divisions: an FMA is one; comparisons, selections and integer steps count.
LOG_WORK, ERF_WORK = 18 + 12, 18 + packed_code.EXP_WORK
OPTION_WORK = LOG_WORK + packed_code.EXP_WORK + 2 * (ERF_WORK + 2) + 10
DIVISIONS = 4  # with log's own, and the root, which the divider computes too
DIVISION_LATENCY = 3  # FMAs' that a division or root takes when the next step waits for it (Agner Fog)
XLA_BITS = 256
"""Registers that XLA's client for CPUs prefers, however wide they are (xla_cpu_prefer_vector_width)."""


def inputs(config: Any) -> tuple[Any, Any, Any]:
    """spot, strike (money) and years, each (n,) float32 and the same at each call."""
    import numpy as np

    random, n = np.random.default_rng(2), config.options
    spot, strike, years = random.uniform(80, 120, n), random.uniform(80, 120, n), random.uniform(0.1, 2, n)
    return spot.astype(np.float32), strike.astype(np.float32), years.astype(np.float32)


def python(config: Any, recorder: Recorder) -> Step:
    spots, strikes, times = (values.tolist() for values in inputs(config))
    log, sqrt, exp, erf = math.log, math.sqrt, math.exp, math.erf
    drift, root_half = RATE + 0.5 * VOLATILITY * VOLATILITY, math.sqrt(0.5)

    def step() -> tuple[list[float], list[float]]:
        calls, puts = [], []
        for spot, strike, years in zip(spots, strikes, times, strict=True):
            spread = VOLATILITY * sqrt(years)
            upper = (log(spot / strike) + drift * years) / spread
            lower = upper - spread
            discounted = strike * exp(-RATE * years)
            call = spot * (0.5 + 0.5 * erf(upper * root_half)) - discounted * (
                0.5 + 0.5 * erf(lower * root_half)
            )
            calls.append(call)
            puts.append(call - spot + discounted)
        return calls, puts

    return step


def _numpy_cdf(x: Any) -> Any:
    """Normal distribution function, float32; absolute error 7.5e-8 (Abramowitz and Stegun 26.2.17).

    numpy has no erf, so this is what a numpy user writes: 21 passes over the array.
    """
    import numpy as np

    t = 1 / (1 + 0.2316419 * np.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = 0.3989422804 * np.exp(-0.5 * x * x) * series
    return 0.5 + np.copysign(0.5 - tail, x)  # np.where on random signs costs five times as much


NUMPY_PASSES, NUMPY_ARRAYS = 16 + 2 * 21, 16 * 2.4 + 2 * (15 * 2 + 6 * 3)


def numpy(config: Any, recorder: Recorder) -> Step:
    import numpy as np

    spot, strike, years = inputs(config)

    def step() -> Any:
        spread = VOLATILITY * np.sqrt(years)
        upper = (np.log(spot / strike) + (RATE + 0.5 * VOLATILITY**2) * years) / spread
        discounted = strike * np.exp(-RATE * years)
        call = spot * _numpy_cdf(upper) - discounted * _numpy_cdf(upper - spread)
        return call, call - spot + discounted

    return step


def _numba_arguments(config: Any) -> tuple[Any, ...]:
    import numpy as np

    return (*inputs(config), np.float32(RATE), np.float32(VOLATILITY))


def numba(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import black_scholes_numba as kernel

    arguments = _numba_arguments(config)
    return rungs.Compiled(recorder, kernel.plain, arguments)


def numba_simd(config: Any, recorder: Recorder) -> Step:
    from labs.vectorization import black_scholes_numba as kernel

    arguments = _numba_arguments(config)
    return rungs.Compiled(recorder, kernel.simd, arguments)


def numba_parallel(config: Any, recorder: Recorder) -> Step:
    from numba import get_num_threads

    from labs.vectorization import black_scholes_numba as kernel

    arguments = (*_numba_arguments(config), 4 * get_num_threads())
    return lambda: kernel.parallel(*arguments)


def jax(config: Any, recorder: Recorder) -> Step:
    import jax
    import jax.numpy as jnp

    def cdf(x: Any) -> Any:  # jax.scipy.stats.norm.cdf computes erf and two erfc, and selects
        return 0.5 + 0.5 * jax.scipy.special.erf(x * math.sqrt(0.5))

    @jax.jit
    def prices(spot: Any, strike: Any, years: Any) -> Any:
        spread = VOLATILITY * jnp.sqrt(years)
        upper = (jnp.log(spot / strike) + (RATE + 0.5 * VOLATILITY**2) * years) / spread
        discounted = strike * jnp.exp(-RATE * years)
        call = spot * cdf(upper) - discounted * cdf(upper - spread)
        return jnp.stack([call, call - spot + discounted])

    arguments = tuple(map(jnp.asarray, inputs(config)))
    return lambda: prices(*arguments)


def _torch_prices(spot: Any, strike: Any, years: Any) -> Any:
    import torch

    spread = VOLATILITY * torch.sqrt(years)
    upper = (torch.log(spot / strike) + (RATE + 0.5 * VOLATILITY**2) * years) / spread
    discounted = strike * torch.exp(-RATE * years)
    halves = [0.5 + 0.5 * torch.erf(x * math.sqrt(0.5)) for x in (upper, upper - spread)]
    call = spot * halves[0] - discounted * halves[1]
    return torch.stack([call, call - spot + discounted])


def _torch_step(config: Any, function: Any) -> Step:
    import torch

    arguments = tuple(map(torch.from_numpy, inputs(config)))

    def step() -> Any:
        with torch.inference_mode():
            return function(*arguments)

    return step


def torch(config: Any, recorder: Recorder) -> Step:
    return _torch_step(config, _torch_prices)


def torch_compile(config: Any, recorder: Recorder) -> Step:
    import torch

    return _torch_step(config, torch.compile(_torch_prices, dynamic=False, fullgraph=True))


def variants(config: Any) -> Sequence[Variant]:
    left_out = "" if config.compile else "left out (--set compile=true): compiling its C++ takes 10 to 40 s"
    bytes_moved = 5.0 * rungs.FLOAT_BYTES * config.options

    def one(name: str, setup: Any, unavailable: str = "", arrays: float = 5.0, **rest: Any) -> Variant:
        return Variant(
            GROUP,
            name,
            setup,
            flops=float(OPTION_FLOPS) * config.options,
            bytes_moved=bytes_moved,
            working_set=arrays * rungs.FLOAT_BYTES * config.options,
            unavailable=unavailable,
            **rest,
        )

    return [
        one("python", python, dtype="float64"),
        one("numpy", numpy, rungs.missing("numpy"), 10),
        one("numba", numba, rungs.missing("numba")),
        one("numba_simd", numba_simd, rungs.missing("numba")),
        one("numba_parallel", numba_parallel, rungs.missing("numba"), threads=0),
        one("jax", jax, rungs.missing("jax"), threads=0, clock="jax"),
        one("torch", torch, rungs.missing("torch"), 10, threads=0),
        one("torch_compile", torch_compile, left_out or rungs.missing_compiler(), threads=0),
    ]


def predict(config: Any, machine: Machine) -> Sequence[Prediction]:
    n = float(config.options)
    array = rungs.FLOAT_BYTES * n
    found = []

    def say(name: str, seconds: float, because: str, suspect: str = "") -> None:
        found.append(Prediction(f"{GROUP}/{name}", "time_s", seconds, because, suspect))

    operation, call = machine["python_operation_s"], machine["python_function_s"]
    item, libm = machine["python_item_s"], machine["libm_exp_s"]
    say(
        "python",
        n * (26 * operation + 7 * call + 5 * item + 7 * libm),
        f"{n:.3g} options x (26 operations x {operation * 1e9:.3g} ns + 7 calls of C x {call * 1e9:.3g} ns "
        f"and what they compute 7 x {libm * 1e9:.3g} ns + 5 items x {item * 1e9:.3g} ns)",
        "erf, which has several ranges",
    )
    moved = rungs.pass_seconds(machine, NUMPY_ARRAYS * array, 10 * array)
    functions = 7 * n * machine["numpy_exp_s"]
    say(
        "numpy",
        moved + functions + NUMPY_PASSES * machine["numpy_call_s"],
        f"{NUMPY_PASSES} passes over {array / 1e6:.3g} MB {rungs.milliseconds(moved)}, log, 3 exp, "
        "root and 2 copysign "
        f"{rungs.milliseconds(functions)}",
        "temporaries that malloc gives back and takes anew (compare the allocator columns)",
    )
    waits = 3 * DIVISION_LATENCY * machine["fma_latency_s"]
    say(
        "numba",
        n * (6 * libm + waits),
        f"{n:.3g} options x (6 x {libm * 1e9:.3g} ns: log and exp 1 each; erf 2 each, an exp and a ratio of "
        f"polynomials, by ranges; + 2 divisions and a root that wait for one another {waits * 1e9:.3g} ns)",
        "erf's ranges are branches that random inputs mispredict",
    )
    lanes = machine["vector_lanes_float32"]
    divided = DIVISIONS * n * machine["packed_division_s"]
    arithmetic = packed_code.instruction_seconds(machine, OPTION_WORK, n) + divided
    arrays = rungs.pass_seconds(machine, 5 * array, 5 * array)
    packed = arithmetic + arrays
    say(
        "numba_simd",
        packed,
        f"{n:.3g} options x {OPTION_WORK} instructions over {lanes:.0f} lanes, {DIVISIONS} divisions and "
        f"roots {rungs.milliseconds(divided)}, + 5 arrays once {rungs.milliseconds(arrays)}",
        "what leaves the registers, of which so long a formula has too few",
    )
    say(
        "numba_parallel",
        rungs.shared_seconds(machine, packed) + machine["numba_call_s"],
        f"{rungs.milliseconds(packed)} / {machine.cores} cores + one parallel region",
        "cores that are busy or that share one core's execution units (hyper-threads)",
    )
    narrower = max(1.0, 32 * lanes / XLA_BITS)
    fused = (arithmetic * narrower + arrays) / machine.cores
    say(
        "jax",
        fused + machine["jax_call_s"],
        f"XLA fuses all into one SIMD loop, of {XLA_BITS}-bit registers and over {machine.cores} cores: "
        f"{rungs.milliseconds(fused)}, + its dispatch",
        "XLA's own polynomials, and how many threads it gives a loop of this size",
    )
    passes, arrays = 25, 25 * 2.3
    split = rungs.pass_seconds(machine, arrays * array, 10 * array, threads=0)
    shared = 5 * n * machine["numpy_exp_s"] / machine.cores
    start = machine["torch_call_s"] + (machine.get("torch_parallel_region_s") or 0.0)
    say(
        "torch",
        split + shared + passes * start,
        f"{passes} operations: {array / 1e6:.3g} MB arrays on all cores {rungs.milliseconds(split)}, "
        "log, exp and "
        f"2 erf {rungs.milliseconds(shared)}, {passes} x {start * 1e6:.3g} us",
        "temporaries that malloc gives back and takes anew",
    )
    return found


def check(config: Any, outputs: Mapping[str, object]) -> Sequence[Check]:
    import numpy as np

    spot, strike, years = (values.astype(np.float64) for values in inputs(config))
    erf = np.vectorize(math.erf, otypes=[np.float64])
    spread = VOLATILITY * np.sqrt(years)
    upper = (np.log(spot / strike) + (RATE + 0.5 * VOLATILITY**2) * years) / spread
    discounted = strike * np.exp(-RATE * years)
    halves = [0.5 + 0.5 * erf(x * math.sqrt(0.5)) for x in (upper, upper - spread)]
    call = spot * halves[0] - discounted * halves[1]
    expected = np.stack([call, call - spot + discounted])

    def error(values: Any) -> float:
        return float(np.max(np.abs(values.astype(np.float64) - expected) / strike))

    # Some ten roundings of amounts up to 1.5 strikes, and a distribution function good to 1.2e-7.
    return rungs.compare(
        outputs, GROUP, error, expected.shape, 32 * rungs.ROUNDING, "float64, relative to the strike"
    )


def _calls(results: Results) -> bool | None:
    plain, simd = f"{GROUP}/numba", f"{GROUP}/numba_simd"
    if not results.has(plain, simd):
        return None
    counts = [values_of(results, name, "libm_calls") for name in (plain, simd)]
    if not all(counts):
        return None
    return all_of(counts[0][-1] > 0, counts[1][-1] == 0, rungs.times_faster(results, simd, plain, 2))


CLAIMS = (
    rungs.faster_claim(
        "numpy is at least 10x pure Python.",
        f"{GROUP}/numpy",
        f"{GROUP}/python",
        10,
        "One bytecode costs as much as numpy's compiled loop takes for dozens of numbers. numpy's price is "
        "a pass over memory per operation.",
    ),
    Claim(
        "A call of the C library keeps a compiled loop scalar; inline polynomials make it SIMD and at least "
        "twice as fast.",
        _calls,
        "numba's LLVM has no vector mathematics library: each log, exp and erf is a call for one number. "
        "When this fails, numba may have got one again: see the libm calls and the register width recorded.",
    ),
    rungs.faster_claim(
        "One fused loop on one core is at least twice as fast as numpy's pass per operation.",
        f"{GROUP}/numba_simd",
        f"{GROUP}/numpy",
        2,
        "numpy writes each intermediate array and reads it again; in the fused loop it stays in a register. "
        "jax.jit and torch.compile fuse, too.",
    ),
)
