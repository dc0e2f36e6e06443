"""What the seconds of a way are made of: each a number of seconds and its formula with numbers.

Rates are one core's times the cores' worth of all of them, since a fused kernel gives each core tiles of its
own: a product of a tile runs on one.
"""

from __future__ import annotations

from labs.machine import Machine
from labs.packed_code import across_lanes_seconds, instruction_seconds
from labs.wording import duration

Term = tuple[float, str]

LIBRARY_SOFTMAX = 25
"""Instructions of torch's softmax on a register of scores: an exp of about 20, scale, maximum, subtraction,
sum, a store."""
OWN_SOFTMAX = 17
"""Of ours (``kernels/attention/cpu_rows.py``): an exp of 13, maximum, subtraction, sum, a store."""
ROW_REDUCTIONS = 2  # of a row of a tile across the lanes: its maximum and its sum


def summed(*terms: Term) -> Term:
    return sum(seconds for seconds, _ in terms), " + ".join(text for _, text in terms)


def cores(machine: Machine) -> float:
    """How many times one core's arithmetic all cores do: less than there are where they share a clock."""
    return machine.peak("float32", threads=0) / machine.peak("float32")


def calls(machine: Machine, count: int, regions: int = 1, custom: int = 0) -> Term:
    """Of torch's operations, so many of them split over the threads; and of operators of our own."""
    seconds = count * machine["torch_call_s"] + regions * (machine.get("torch_parallel_region_s") or 0.0)
    seconds += custom * (machine.get("torch_custom_call_s") or 0.0)
    return seconds, f"{count + custom} calls {duration(seconds)}"


def products(machine: Machine, flops: float, each: float) -> Term:
    """FLOPs in products of ``each``, at the rate of the library's square ones of that size.

    Our own kernel's too: what keeps a small product from the peak (loads beside each FMA, edges) is the same.
    """
    rate = cores(machine) * machine.product_rate(each)
    return (
        flops / rate,
        f"{flops:.3g} FLOPs in products of {each:.3g} at {rate / 1e9:.0f} GFLOP/s {duration(flops / rate)}",
    )


def softmax(machine: Machine, weights: float, rows: float, instructions: int) -> Term:
    """Of so many scores in so many rows."""
    packed = instruction_seconds(machine, instructions, weights)
    seconds = (packed + rows * ROW_REDUCTIONS * across_lanes_seconds(machine)) / cores(machine)
    return seconds, f"softmax of {weights:.3g} in {rows:.3g} rows {duration(seconds)}"


def moved(machine: Machine, count: float, working_set: float, what: str, kind: str = "copy") -> Term:
    """So many bytes in passes over a working set."""
    rate = machine.bandwidth(working_set, kind=kind, threads=0)
    return count / rate, f"{count:.3g} B of {what} at {rate / 1e9:.0f} GB/s {duration(count / rate)}"
