"""Where an eager chain leaves its overhead behind, and when compiling has paid for itself.

crossover   length at which the calls of an eager chain cost as much as its bytes
break-even  time of the first call, which compiles / saving of each call
compiled    (first call) what capturing costs + what the code generator behind it costs
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from labs.lab import Interval, Measurement, Prediction, Results
from labs.machine import Machine
from labs.programming_models import chain
from labs.programming_models.config import Config
from labs.programming_models.ways import unavailable
from labs.wording import us

MANY = 2**16
FEW = {"torch": 2**8, "numpy": 2**8, "jax": 2**14}
"""Numbers in the chains that the crossover is taken from. Both of JAX's are long enough to be handed to XLA's
thread: a short one runs on the caller's, and the difference would pass for bytes."""
COMPILED = ("torch_compile", "jax_jit", "numba")
EAGER = ("torch", "jax", "numpy")
BASE = {"torch_compile": "torch", "jax_jit": "jax", "numba": "numpy"}


def crossing(name: str, short: float, long: float) -> float:
    """Length at which overhead is half of an eager chain's time, from the times of its chains of ``FEW`` and
    ``MANY`` numbers: overhead / time of one more number. Infinite where the longer one is not slower."""
    slope = (long - short) / (MANY - FEW[name])
    return short / slope - FEW[name] if slope > 0 else math.inf


def crossover_elements(machine: Machine, name: str) -> float:
    return crossing(name, *(chain.cost(machine, size, name).seconds for size in (FEW[name], MANY)))


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
    saving = chain.cost(machine, size, BASE[name]).seconds - chain.cost(machine, size, name).seconds
    return compile_seconds(machine, name)[0] / saving if saving > 0 else float("inf")


def predict(config: Config, machine: Machine) -> list[Prediction]:
    """Compile times, break-even calls and crossovers."""
    found = []
    largest = config.elements
    for name in COMPILED:
        if unavailable(f"chain_{largest}", name):
            continue
        if name == "torch_compile" and machine.get("cxx_compile_s") is None:
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
                    f"overhead {us(chain.cost(machine, FEW[name], name).seconds)} over the time of one more "
                    "number, from the "
                    f"predicted times of {FEW[name]} and {MANY}",
                    "what a call costs beside those that its constant comes from; cache lines that a nearer "
                    "cache still holds",
                )
            )
    return found


def derive(results: Results) -> Sequence[Measurement]:
    found = []
    for name in EAGER:
        if (length := crossover(results, name)) is not None:
            found.append(Measurement(f"crossover_{name}_elements", length))
    largest = results.config.elements
    for name in COMPILED:
        if (calls := breakeven(results, largest, name)) is not None:
            found.append(Measurement(f"breakeven_{name}_{largest}", calls))
    return found


def crossover(results: Results, name: str) -> Interval | None:
    """``crossing`` of measured times; None where the longer chain is not slower for certain."""
    addresses = [f"chain_{size}/{name}" for size in (FEW[name], MANY)]
    if not results.has(*addresses):
        return None
    short, long = (results.seconds(address) for address in addresses)
    ends = (crossing(name, short.low, long.high), crossing(name, short.high, long.low))
    value = crossing(name, short.value, long.value)
    return Interval(value, *ends) if math.isfinite(value) and math.isfinite(ends[1]) else None


def breakeven(results: Results, size: int, name: str) -> Interval | None:
    """Calls of a chain after which its first, compiling one has paid; infinite where a call saves nothing."""
    eager, compiled = f"chain_{size}/{BASE[name]}", f"chain_{size}/{name}"
    if not results.has(eager, compiled):
        return None
    slow, fast = results.seconds(eager), results.seconds(compiled)
    first = results.cold_seconds(compiled)

    def calls(saving: float) -> float:
        return first / saving if saving > 0 else math.inf

    return Interval(calls(slow.value - fast.value), calls(slow.high - fast.low), calls(slow.low - fast.high))
