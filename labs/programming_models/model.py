"""Seconds of each way, before it runs.

  eager     operations x cost of a call + bytes of every operation / bandwidth
  captured  the same: capturing a program does not fuse it
  fused     one call + max(bytes of the fused loop / bandwidth, FLOPs / FMA peak)
  compiled  (first call) what capturing costs + what the code generator behind it costs

A call's cost differs between frameworks and is a constant of the machine, as are what recording it for a
gradient adds, what entering a compiled function costs, and what a compiler takes for a program of two
operations. Matrix products run at the FMA peak. The crossover of an eager chain is the length at which its
calls cost as much as its bytes; a compiled function has paid for itself after compile time / saving per call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labs.lab import Prediction
from labs.machine import Machine
from labs.programming_models import behaviours, chain, gpt_block, rnn, training_step
from labs.programming_models.config import HIDDEN, ROWS, Config
from labs.programming_models.ways import (
    FLOAT,
    block_flops,
    rnn_flops,
    training_flops,
    unavailable,
)

FEW, MANY = 2**8, 2**16  # numbers in the chains that the crossover is taken from
XLA_INLINE_FLOPS = 1000  # the CPU client runs cheaper programs on the thread that calls
# Calls, counted by a dispatch mode in torch, by the jaxpr in JAX and in the text for NumPy (held by tests).
# The loss: a product and a sum a layer, a comparison and a product for ReLU, difference, square, mean.
LOSS_CALLS = 2 * training_step.LAYERS + 2 * (training_step.LAYERS - 1) + 3
BACKWARD_CALLS = 11  # transposes, views and second products, beside one operation for each of the forward's
LOSS_PRODUCTS = 3 * training_step.LAYERS - 1
UPDATE_CALLS = 2 * training_step.LAYERS  # parameters
# NumPy's step by hand: products, reductions (a mean is two), and everything else.
NUMPY_STEP = (LOSS_PRODUCTS, training_step.LAYERS + 2, 26)
NUMPY_BLOCK = (8, 10, 62)
BLOCK_CALLS, BLOCK_PRODUCTS, BLOCK_KERNELS = 38, 6, 6
BLOCK_MODULES, BLOCK_JAX_CALLS = 13, 90


@dataclass(frozen=True)
class Cost:
    """Seconds of one call of a step, the formula with its numbers, and what to suspect."""

    seconds: float
    because: str
    suspect: str


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"


def _entry(machine: Machine, name: str) -> float:
    """Entering a fused program once."""
    return machine[
        {
            "torch_compile": "torch_compiled_call_s",
            "jax_jit": "jax_array_call_s",
            "jax_scan": "jax_array_call_s",
            "numba": "numba_array_call_s",
        }[name]
    ]


def _call(machine: Machine, name: str) -> float:
    """One operation of an eager program."""
    return machine[{"numpy": "numpy_call_s", "jax": "jax_eager_call_s"}.get(name, "torch_call_s")]


# --- the chain -------------------------------------------------------------------------------------------


def chain_cost(machine: Machine, size: int, name: str) -> Cost:
    array = float(FLOAT * size)
    if name in ("torch_compile", "jax_jit", "numba"):
        entry = _entry(machine, name)
        rate = machine.bandwidth(chain.FUSED_ARRAYS * array)
        memory, flops = chain.FUSED_ARRAYS * array / rate, chain.OPERATIONS * size / machine.peak("float32")
        return Cost(
            entry + max(memory, flops),
            f"a call {us(entry)} + max({chain.FUSED_ARRAYS} arrays at {rate / 1e9:.3g} GB/s "
            f"{us(memory)}, FMAs "
            f"{us(flops)})",
            "what entering costs beside guards: unpacking arguments, a fresh output, waiting for "
            "another thread",
        )
    call, rate = _chain_call(machine, size, name), machine.bandwidth(3 * array)
    entry = machine["torch_exported_call_s"] if name == "torch_export" else 0.0
    entry_text = f"entering the module {us(entry)} + " if entry else ""
    memory = chain.EAGER_ARRAYS * array / rate
    return Cost(
        entry + chain.OPERATIONS * call + memory,
        f"{entry_text}{chain.OPERATIONS} calls x {us(call)} + {chain.EAGER_ARRAYS} arrays of "
        f"{array:.3g} B at "
        f"{rate / 1e9:.3g} GB/s {us(memory)}",
        "pages: NumPy asks for huge ones, torch and JAX do not; JAX's "
        "eager operations are handed to another thread from a thousand FLOPs on",
    )


def _chain_call(machine: Machine, size: int, name: str) -> float:
    """An operation of the chain, on average: in torch seven of twelve have a Python number; XLA hands what
    has more than a thousand FLOPs to a thread."""
    if name == "jax" and size > XLA_INLINE_FLOPS:
        return machine["jax_eager_array_call_s"]
    if name in ("numpy", "jax"):
        return _call(machine, name)
    numbers = chain.OPERATIONS // 2 + 1
    others = chain.OPERATIONS - numbers
    scalar, call = machine["torch_scalar_call_s"], machine["torch_call_s"]
    return (numbers * scalar + others * call) / chain.OPERATIONS


def crossing(short: float, long: float) -> float:
    """Length at which overhead is half of an eager chain's time, from the times of its chains of 2^8 and 2^16
    numbers: overhead / time of one more number. Infinite where the longer one is not slower."""
    slope = (long - short) / (MANY - FEW)
    return short / slope - FEW if slope > 0 else math.inf


def crossover_elements(machine: Machine, name: str) -> float:
    return crossing(*(chain_cost(machine, size, name).seconds for size in (FEW, MANY)))


# --- the networks ----------------------------------------------------------------------------------------


def training_cost(config: Config, machine: Machine, name: str) -> Cost:
    flops = training_flops(config)
    compute = flops / machine.peak("float32")
    work = f"{flops:.3g} FLOPs at the FMA peak {us(compute)}"
    if name == "jax_jit":
        entry = _entry(machine, name)
        inner = 2 * LOSS_PRODUCTS * machine["jax_product_call_s"]
        return Cost(
            entry + inner + compute,
            f"a call {us(entry)} + {LOSS_PRODUCTS} products and as many fused kernels {us(inner)} + {work}",
            "small products run below the FMA peak; eight arguments are unpacked, seven outputs made; "
            "XLA spreads independent products over threads, which must be free",
        )
    if name == "jax":
        recorded, call = machine["jax_recorded_call_s"], machine["jax_eager_call_s"]
        calls = LOSS_CALLS * recorded + 2 * UPDATE_CALLS * call
        return Cost(
            calls + compute,
            f"{LOSS_CALLS} calls with their gradient x {us(recorded)} + {2 * UPDATE_CALLS} x "
            f"{us(call)} + {work}",
            "tracing for the gradient, which JAX does again at each call without jit, depends on the "
            "operation",
        )
    if name == "numpy":
        calls, text = _numpy_calls(machine, *NUMPY_STEP)
        return Cost(calls + compute, f"{text} + {work}", "small products run below the FMA peak")
    recorded, call = machine["torch_recorded_call_s"], machine["torch_call_s"]
    product = machine["torch_product_call_s"]
    products = LOSS_PRODUCTS * product
    update = UPDATE_CALLS * call
    if name == "torch_compile":
        entry = machine["torch_compiled_gradient_s"]
        return Cost(
            entry + products + update + compute,
            f"a compiled call and its gradient {us(entry)} + {LOSS_PRODUCTS} products "
            f"{us(products)} + {UPDATE_CALLS} updates {us(update)} + {work}",
            "guards on eight arguments and the autograd function around the graph; small products "
            "below the peak",
        )
    calls = LOSS_CALLS * recorded + BACKWARD_CALLS * call
    return Cost(
        calls + products + update + compute,
        f"{LOSS_CALLS} calls with their gradient x {us(recorded)} + {BACKWARD_CALLS} more backward x "
        f"{us(call)} + "
        f"{LOSS_PRODUCTS} products x "
        f"{us(product)} + "
        f"{UPDATE_CALLS} updates {us(update)} + {work}",
        "the backward of a product or a sum is several operations (transposes, sums over rows)",
    )


def _numpy_calls(machine: Machine, products: int, reductions: int, others: int) -> tuple[float, str]:
    found = [
        (products, "products", machine["numpy_product_call_s"]),
        (reductions, "reductions", machine["numpy_reduction_call_s"]),
        (others, "calls", machine["numpy_call_s"]),
    ]
    text = " + ".join(f"{count} {what} x {us(seconds)}" for count, what, seconds in found)
    return sum(count * seconds for count, _, seconds in found), text


def rnn_cost(config: Config, machine: Machine, name: str) -> Cost:
    steps, compute = config.steps, rnn_flops(config) / machine.peak("float32")
    if name in ("jax_jit", "jax_scan"):
        inner = 2 * machine["jax_product_call_s"]
        each = f"{steps} steps x (a product and a fused kernel {us(inner)}) inside XLA"
        entry = _entry(machine, name)
        return Cost(
            entry + steps * inner + compute,
            f"a call {us(entry)} + {each}",
            "what XLA puts around a small product: copies of the state, a library call or a loop of its own",
        )
    if name == "numba":
        tanh = ROWS * HIDDEN * 2 * machine["libm_exp_s"]
        library = machine["numpy_call_s"]
        return Cost(
            machine["numba_call_s"] + steps * (tanh + library) + compute,
            f"{steps} steps x (tanh {us(tanh)} + a library call for the product {us(library)})",
            "tanh of the C library, and arrays that numba allocates in the loop",
        )
    if name == "numpy":
        tanh = ROWS * HIDDEN * 2 * machine["numpy_exp_s"]
        calls, text = _numpy_calls(machine, 1, 0, 3)
        return Cost(
            steps * (calls + tanh) + compute,
            f"{steps} steps x ({text} + tanh {us(tanh)})",
            "indexing, which is a small call, and tanh against exp",
        )
    if name == "jax":
        call, index = machine["jax_eager_call_s"], machine["jax_index_call_s"]
        product = machine["jax_eager_array_call_s"]
        return Cost(
            steps * (index + product + 2 * call) + compute,
            f"{steps} steps x (index {us(index)} + product {us(product)} + sum, tanh 2 x {us(call)})",
            "operations that wait for another thread's result, and that thread",
        )
    call, product = machine["torch_call_s"], machine["torch_product_call_s"]
    if name == "torch_cell":
        entry = machine["torch_compiled_call_s"]
        return Cost(
            steps * (call + entry + product) + compute,
            f"{steps} steps x (index {us(call)} + a compiled call {us(entry)} + product {us(product)})",
            "guards, which are checked at each step, and the code around the product",
        )
    if name == "torch_compile":
        entry = machine["torch_compiled_call_s"]
        return Cost(
            entry + steps * (product + call) + compute,
            f"a compiled call {us(entry)} + {steps} x (product {us(product)} + a generated kernel "
            f"{us(call)})",
            "inductor's Python around each product and kernel",
        )
    return Cost(
        steps * (3 * call + product) + compute,
        f"{steps} steps x (index, sum, tanh 3 x {us(call)} + product {us(product)})",
        "indexing and tanh against a negation",
    )


def block_cost(config: Config, machine: Machine, name: str) -> Cost:
    compute = block_flops(config) / machine.peak("float32")
    work = f"{block_flops(config):.3g} FLOPs at the FMA peak {us(compute)}"
    if name == "numpy":
        calls, text = _numpy_calls(machine, *NUMPY_BLOCK)
        return Cost(calls + compute, f"{text} + {work}", "where, and a tanh and powers of many numbers")
    if name == "jax":
        call = machine["jax_eager_array_call_s"]
        return Cost(
            BLOCK_JAX_CALLS * call + compute,
            f"{BLOCK_JAX_CALLS} calls x {us(call)} + {work}",
            "functions of jax.numpy that are jitted themselves count as one, others as several calls",
        )
    if name == "jax_jit":
        pieces = BLOCK_PRODUCTS + 2 + BLOCK_KERNELS
        entry, inner = _entry(machine, name), pieces * machine["jax_product_call_s"]
        return Cost(
            entry + inner + compute,
            f"a call {us(entry)} + {pieces} products and kernels {us(inner)} + {work}",
            "small products run below the FMA peak; XLA spreads independent ones over threads, which "
            "must be free",
        )
    products = BLOCK_PRODUCTS * machine["torch_product_call_s"]
    if name == "torch_compile":
        entry, kernels = machine["torch_compiled_call_s"], BLOCK_KERNELS * machine["torch_call_s"]
        return Cost(
            entry + products + kernels + compute,
            f"a compiled call {us(entry)} + {BLOCK_PRODUCTS} products {us(products)} + {BLOCK_KERNELS} "
            "generated "
            f"kernels {us(kernels)} + {work}",
            "attention, which stays a library call; small products run below the FMA peak",
        )
    calls = (BLOCK_CALLS - BLOCK_PRODUCTS) * machine["torch_call_s"]
    if name == "torch_export":
        around, where = machine["torch_exported_call_s"], "entering the program"
    else:
        around, where = BLOCK_MODULES * machine["torch_module_call_s"], f"{BLOCK_MODULES} modules"
    return Cost(
        around + calls + products + compute,
        f"{where} {us(around)} + {BLOCK_CALLS - BLOCK_PRODUCTS} calls x {us(machine['torch_call_s'])} + "
        f"{BLOCK_PRODUCTS} products {us(products)} + {work}",
        "layer norm, GELU and attention cost more than a call; Python's code between the operations",
    )


# --- compiling -------------------------------------------------------------------------------------------


def compile_seconds(machine: Machine, name: str) -> tuple[float, str]:
    """Of a program of a dozen operations: what a program of two costs."""
    if name == "jax_jit":
        return machine["jax_first_call_s"], "trace and compile, as for two operations"
    if name == "numba":
        return machine["numba_compile_s"], "type and compile, as for one expression"
    capture, generated = machine["torch_capture_s"], machine["cxx_compile_s"]
    return capture + generated, f"capture {capture:.2g} s + a C++ file {generated:.2g} s"


def breakeven_calls(machine: Machine, size: int, name: str) -> float:
    """Calls after which the chain's compilation is paid for; infinite where a call saves nothing."""
    base = "jax" if name.startswith("jax") else "numpy" if name == "numba" else "torch"
    saving = chain_cost(machine, size, base).seconds - chain_cost(machine, size, name).seconds
    return compile_seconds(machine, name)[0] / saving if saving > 0 else float("inf")


# --- everything ------------------------------------------------------------------------------------------

COMPILED = ("torch_compile", "jax_jit", "numba")
EAGER = ("torch", "jax", "numpy")


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    found: list[Prediction] = []

    def say(group: str, name: str, cost: Cost) -> None:
        found.append(Prediction(f"{group}/{name}", "time_s", cost.seconds, cost.because, cost.suspect))

    for size in config.sizes:
        for name in chain.NAMES:
            if name not in chain.CUDA and not unavailable(f"chain_{size}", name):
                say(f"chain_{size}", name, chain_cost(machine, size, name))
    parts = (
        ("training_step", training_step.NAMES, training_cost),
        ("rnn_loop", rnn.NAMES, rnn_cost),
        ("gpt_block", gpt_block.NAMES, block_cost),
    )
    for group, names, cost in parts:
        for name in names:
            if not unavailable(group, name):
                say(group, name, cost(config, machine, name))
    found += _once(config, machine)
    found += _counted(config)
    return found


def _once(config: Config, machine: Machine) -> list[Prediction]:
    """Compile times, break-even calls and crossovers."""
    found = []
    largest = config.elements
    for name in COMPILED:
        needed = {"torch_compile": "cxx_compile_s"}.get(name, "cores")
        if unavailable(f"chain_{largest}", name) or machine.get(needed) is None:
            continue  # a C++ compiler that fails is named in the machine's facts, and by the way itself
        seconds, because = compile_seconds(machine, name)
        suspect = (
            "the machine's load: a compiler needs a core for itself for a second; a larger program than the "
            "constant's"
        )
        found.append(Prediction(f"chain_{largest}/{name}", "compile_s", seconds, because, suspect))
        calls = breakeven_calls(machine, largest, name)
        found.append(
            Prediction(
                "",
                f"breakeven_{name}_{largest}",
                calls,
                f"{seconds:.3g} s of compiling / what a call of {largest} numbers saves",
                "all that the compile time and both times of a call are off by",
            )
        )
    for name in EAGER:
        if not unavailable("chain", name):
            found.append(
                Prediction(
                    "",
                    f"crossover_{name}_elements",
                    crossover_elements(machine, name),
                    f"overhead {us(chain_cost(machine, FEW, name).seconds)} over the time of one more "
                    "number, from the "
                    f"predicted times of {FEW} and {MANY}",
                    "what a call costs beside a negation's; cache lines that a nearer cache still holds",
                )
            )
    return found


def expected(config: Config) -> dict[tuple[str, str], dict[str, float]]:
    """(program, way) -> what is counted of it: graphs (compilations), effects, refused (1) or not (0)."""
    shapes = config.shapes
    buckets = len({(3 + 2 * index - 1).bit_length() for index in range(shapes)})
    graphs = {
        ("branch", "torch_compile"): 3.0,  # up to the branch, and each of its two ends
        ("branch", "torch_cond"): 1.0,
        ("branch", "jax_cond"): 1.0,
        ("branch", "numba"): 1.0,
        ("new_shapes", "torch_compile"): 2.0,  # the second shape makes the length a symbol
        ("new_shapes", "torch_static"): float(min(shapes, behaviours.RECOMPILE_LIMIT)),
        ("new_shapes", "torch_dynamic"): 1.0,
        ("new_shapes", "jax_jit"): float(shapes),
        ("new_shapes", "jax_padded"): float(buckets),
        ("new_shapes", "numba"): 1.0,
    }
    refused = {
        ("branch", "torch_fullgraph"), ("branch", "torch_export"), ("branch", "fx"), ("branch", "jax_jit"),
        ("side_effect", "numba"), ("selection", "jax_jit"), ("new_shapes", "torch_export"),
    }  # fmt: skip
    effects = {
        "torch": 3.0,
        "torch_compile": 3.0,
        "jax": 3.0,
        "numpy": 3.0,
        "torch_export": 1.0,
        "fx": 1.0,
        "jax_jit": 1.0,
    }
    found: dict[tuple[str, str], dict[str, float]] = {}
    for program, ways in behaviours.WAYS.items():
        for way in ways:
            key = (program, way)
            counted = found[key] = {"refused": float(key in refused)}
            if key in graphs:
                counted["graphs"] = graphs[key]
            if program == "side_effect" and key not in refused:
                counted["effects"] = effects[way]
    return found


def _counted(config: Config) -> list[Prediction]:
    because = {
        "refused": "1 where the way needs a value or a shape that it does not have while it captures",
        "graphs": "one graph for each set of shapes, types and branches that it was captured for",
        "effects": "Python runs at each call where it is interpreted or replayed, once where it is captured",
    }
    return [
        Prediction(f"{program}/{way}", key, value, because[key], exact=True)
        for (program, way), counts in expected(config).items()
        if not unavailable(program, way)
        for key, value in counts.items()
    ]


def memory_bytes(config: Config) -> float:
    """The longest chain's temporaries of some ways at once, and its float64 reference."""
    return 16.0 * FLOAT * config.elements + 100.0 * config.width**2 + 2**30
