"""The formulas: seconds of a step, healthy and with each fault.

healthy     FLOPs / rate of the library's square products of the type and size
            + calls x AUTOGRAD x cost of a call + (TRIPS x activations + 28 B x parameters) / copy bandwidth
input       + sequences x time of a read; read ahead max(healthy, time of a read)
python      + probabilities x (an item, a float, a call, three operations, a logarithm)
dispatch    calls x pieces
allocator   + FRESH x activations x page fault
memory_bandwidth    + what is read and written once more for each operation that is not fused
memory_capacity     healthy with all scores kept; recomputed + a third of it
compute_precision   the same FLOPs at float32's rate
communication       + pieces x (parameters exchanged one by one by ring over gloo); in buckets + one exchange
straggler           healthy of the largest share
oversubscription    + parallel regions x threads too many x a switch between processes

What a fault costs (fault - fixed; of memory_capacity fixed - fault, the price of computing again) is
predicted by itself: beside the healthy step it may be small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from labs import gloo_costs
from labs.bottlenecks.config import Config
from labs.bottlenecks.faults import DEEPER, NARROWER
from labs.lab import Interval, Measurement, Prediction, Results
from labs.machine import Machine

if TYPE_CHECKING:
    from labs.models.configuration import GPTConfig

QUERIES, KEYS = ((768, 256), (192, 64), (0, 32)), 512
"""In a block of attention: queries by the least length of a sequence, and keys."""
ATTENTION_PRODUCTS = 2 + 5  # of a block, forward and backward
AUTOGRAD = 3  # plain calls that a recorded call and its part of backward cost
TRIPS = 5  # of a kept tensor: written, read on, read in backward, its gradient written and read
ADAMW_BYTES = 28  # of a parameter: itself, gradient, two moments read; all but the gradient written
BLOCK_CALLS, OTHER_CALLS = 490, 160  # operators of a block and of the rest of a step (torch.profiler)
BLOCK_REGIONS = 200  # of a block: operators, or their parts, that are divided among threads
FRESH = 3  # kept tensors, their gradients, and what lives for one operation are new memory in each step
UNFUSED_HIDDEN, UNFUSED_STATES = 26, 30  # passes over each kind, forward and backward
PARAMETERS_OF_BLOCK, OTHER_PARAMETERS = 16, 4  # tensors


@dataclass(frozen=True)
class Seconds:
    """Of a step: what a healthy one takes, and the fault's part with its formula."""

    healthy: float
    fault: float = 0.0
    because: str = ""

    @property
    def total(self) -> float:
        return self.healthy + self.fault

    def __str__(self) -> str:
        return f"healthy {1e3 * self.healthy:.3g} ms" + (
            f" + {self.because}: {1e3 * self.fault:.3g} ms" if self.because else ""
        )


def precision_of(machine: Machine) -> str:
    """The type of a healthy job's products."""
    return "bfloat16" if machine.get("matrix_bfloat16_1_flops") else "float32"


def healthy(
    config: Config,
    machine: Machine,
    *,
    precision: str = "",
    sequences: int | None = None,
    length: int | None = None,
    pieces: int = 1,
    threads: int = 1,
) -> float:
    """Seconds of a step of ``sequences`` of ``length``, its batch in so many pieces."""
    from labs.models.formulas import activation_bytes, parameters

    sequences = config.sequences if sequences is None else sequences
    length = config.length if length is None else length
    gpt = config.gpt()
    products = product_seconds(
        gpt, machine, precision or precision_of(machine), sequences, length, pieces, threads
    )
    activations = activation_bytes(gpt, sequences, length)
    rate = machine.bandwidth(activations / pieces, threads=threads)
    moved = TRIPS * activations + ADAMW_BYTES * parameters(gpt)
    calls = pieces * (BLOCK_CALLS * gpt.layers + OTHER_CALLS) * AUTOGRAD * machine["torch_call_s"]
    return products + moved / rate + calls


def product_seconds(
    gpt: GPTConfig, machine: Machine, precision: str, sequences: int, length: int, pieces: int, threads: int
) -> float:
    """Of the matrix products of a step: linear layers have twice as many in backward, each as large.

    Attention on a CPU is computed a block of queries and keys of one head at a time, by products so small
    that a call is most of them (torch's FlashAttentionKernel.cpp).
    """
    tokens = sequences * length
    width, hidden = gpt.width, gpt.size_of_hidden
    columns = [width * width] * 4 + [width * hidden] * 2
    linear = [2.0 * tokens / pieces * each for each in columns * gpt.layers + [width * gpt.vocabulary]]
    queries = next(count for least, count in QUERIES if length >= least)
    block = 2.0 * min(queries, length) * min(KEYS, length) * gpt.size_of_head
    blocks = -(-length // queries) * -(-length // KEYS) * sequences * gpt.heads * gpt.layers

    def took(flops: float) -> float:
        return flops / machine.product_rate(flops, precision, threads=threads)

    return 3 * pieces * sum(map(took, linear)) + ATTENTION_PRODUCTS * blocks * took(block)


def step_bytes(config: Config) -> int:
    """Bytes that a step allocates at its peak: half the float32 activations (products are in 16 bits), the
    gradients, and the parameters in 16 bits."""
    from labs.models.formulas import activation_bytes, parameters

    gpt = config.gpt()
    return activation_bytes(gpt, config.sequences, config.length) // 2 + 6 * parameters(gpt)


def seconds(config: Config, machine: Machine, address: str) -> Seconds:
    """Of one variant."""
    from labs.models.formulas import activation_bytes, parameters

    gpt = config.gpt()
    group, _, name = address.partition("/")
    fault, plain = name == "fault", healthy(config, machine)
    read = config.read_ms / 1e3
    if group == "input":
        if fault:
            return Seconds(
                plain, config.sequences * read, f"{config.sequences} reads of {config.read_ms:g} ms"
            )
        return Seconds(plain, max(0.0, read - plain), "what a read takes longer than a step")
    if group == "python" and fault:
        each = machine["python_item_s"] + machine["python_call_s"] + 3 * machine["python_operation_s"]
        each += machine["libm_exp_s"] + machine["pickle_item_s"] / 2  # a float object is made of each
        count = config.python_passes * config.tokens * gpt.vocabulary
        return Seconds(plain, count * each, f"{count} probabilities x {1e9 * each:.3g} ns")
    if group == "dispatch":
        length = config.piece_length
        many = config.tokens // length
        narrow = replace(config, width=config.width // NARROWER)
        whole = healthy(narrow, machine, sequences=many, length=length, pieces=many if fault else 1)
        return Seconds(whole)
    if group == "allocator" and fault:
        new = FRESH * activation_bytes(gpt, config.sequences, config.length) / 2  # 16 bits
        return Seconds(plain, new * machine["page_fault_s_per_byte"], f"page faults of {new / 1e6:.3g} MB")
    if group == "memory_bandwidth" and fault:
        states = 4 * config.tokens * gpt.width
        parts = ((UNFUSED_HIDDEN, 4 * states), (UNFUSED_STATES, states))
        moved = [2 * gpt.layers * passes * size for passes, size in parts]
        rates = [machine.bandwidth(2 * size) for _, size in parts]  # of a pass: what is read, what is written
        more = sum(size / rate for size, rate in zip(moved, rates, strict=True))
        return Seconds(plain, more, f"{sum(moved) / 1e6:.3g} MB more are read and written")
    if group == "memory_capacity":
        deep = healthy(replace(config, layers=DEEPER * config.layers), machine)
        return Seconds(deep, 0.0 if fault else deep / 3, "" if fault else "forward once more")
    if group == "compute_precision" and fault:
        return Seconds(healthy(config, machine, precision="float32"))
    if group == "oversubscription":
        many = machine.cores * config.threads
        whole = healthy(config, machine, threads=1 if machine.cores <= 2 else 0)
        extra = BLOCK_REGIONS * gpt.layers * (many - machine.cores) * machine["process_switch_s"]
        shared = healthy(config, machine, threads=0)
        return Seconds(shared, extra, f"{many} threads take turns") if fault else Seconds(whole)
    if group in ("communication", "straggler"):
        share = max(config.shares(uneven=fault and group == "straggler"))
        pieces = share if group == "communication" else 1
        busy = healthy(config, machine, sequences=share, pieces=pieces)
        crowd = max(1.0, config.ranks / machine.cores)
        latency = crowd * gloo_costs.seconds(machine, "all_reduce", 0.0, config.ranks)
        whole = crowd * gloo_costs.seconds(machine, "all_reduce", 4.0 * parameters(gpt), config.ranks)
        if group == "communication" and fault:
            tensors = PARAMETERS_OF_BLOCK * gpt.layers + OTHER_PARAMETERS
            waiting = pieces * (whole + (tensors - 1) * latency)
            return Seconds(busy, waiting, f"{pieces * tensors} exchanges of a parameter")
        return Seconds(busy, whole, "one exchange")
    return Seconds(plain)


SUSPECTS = {
    "input": "the storage sleeps: a timer is late by what other programs take",
    "python": "the interpreter's specialised instructions; the list of all numbers, made first",
    "dispatch": "products and attention of a narrow model, far from the peak; autograd's part of a call",
    "allocator": "how much memory is new: blocks below the threshold are kept",
    "memory_bandwidth": "tensors that fit a cache are read faster; passes that torch makes by itself",
    "memory_capacity": "products too small for the peak",
    "compute_precision": "products too small for the peak; conversions between the types",
    "oversubscription": "threads that spin before they sleep take the core from those which have work",
    "communication": "gloo wakes a process and two threads for each message: a busy machine is late",
    "straggler": "products too small for the peak; ranks that share caches and memory",
    "none": "products too small for the peak; conversions between the types",
}


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    from labs.bottlenecks.ways import HEALTHY, PAIRS, RANKED

    groups = (*PAIRS, *RANKED)
    addresses = [HEALTHY, *(f"{group}/{name}" for group in groups for name in ("fault", "fixed"))]
    found = []
    for address in addresses:
        said = seconds(config, machine, address)
        suspect = SUSPECTS[address.partition("/")[0]]
        found.append(Prediction(address, "time_s", said.total, str(said), suspect))
    for group in groups:
        fault, fixed = (seconds(config, machine, f"{group}/{name}").total for name in ("fault", "fixed"))
        because = f"{1e3 * fault:.3g} ms with the fault, {1e3 * fixed:.3g} ms without"
        found.append(
            Prediction("", f"{group}_cost_s", _sign(group) * (fault - fixed), because, SUSPECTS[group])
        )
    return found


def _sign(group: str) -> float:
    """Computing activations again costs time; every other fix saves it."""
    return -1.0 if group == "memory_capacity" else 1.0


def derive(results: Results) -> Sequence[Measurement]:
    """What each fault costs a step, by the paired ratio of its variants."""
    from labs.bottlenecks.ways import PAIRS, RANKED

    found = []
    for group in (*PAIRS, *RANKED):
        fault, fixed = f"{group}/fault", f"{group}/fixed"
        if not results.has(fault, fixed):
            continue
        whole, ratio = results.seconds(fault).value, results.ratio(fixed, fault)
        ends = [_sign(group) * whole * (1.0 - each) for each in (ratio.value, ratio.low, ratio.high)]
        found.append(Measurement(f"{group}_cost_s", Interval(ends[0], min(ends), max(ends))))
    return found


def memory_bytes(config: Config) -> float:
    """Two jobs of a group at once, on every rank."""
    from labs.models.formulas import parameters

    return config.ranks * (2 * 16.0 * parameters(config.gpt()) + 3.0 * step_bytes(config) + 5e8)
