"""The formulas: seconds of a step, healthy and with each fault.

healthy     products, attention, activations, calls and update (``labs/training_seconds.py``)
input       + sequences x time of a read; read ahead max(healthy, time of a read)
python      + probabilities x (a turn, an item, a float, a function, a call, three operations, a logarithm)
dispatch    products, attention, activations and calls of every piece, and one update
allocator   + FRESH x activations x page fault
memory_bandwidth    + what is read and written once more for each operation that is not fused
memory_capacity     healthy of the deeper model; recomputed + its forward pass
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
from typing import Any

from labs import gloo_costs
from labs.bottlenecks.config import Config
from labs.bottlenecks.faults import DEEPER, NARROWER
from labs.lab import Interval, Measurement, Prediction, Results
from labs.machine import Machine
from labs.training_seconds import ADAMW_BYTES, Batch, backward, bandwidth, forward, update

BLOCK_REGIONS = 200  # of a block: operators, or their parts, that are divided among threads
FRESH = 3  # kept tensors, their gradients, and what lives for one operation are new memory in each step
UNFUSED_HIDDEN, UNFUSED_STATES = 26, 30  # passes over each kind, forward and backward
UNFUSED_UPDATE = 80 - ADAMW_BYTES
"""Of a parameter more: mul, lerp, mul, addcmul, sqrt, div, add and addcdiv, each a pass of its own."""
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


def batch_of(config: Config, machine: Machine, pieces: int = 1, **others: Any) -> Batch:
    """A step's batch, or one of so many equal pieces of it; others: as in ``Batch``, of the whole. A group's
    two jobs take turns."""
    given: dict[str, Any] = {
        "sequences": config.sequences,
        "length": config.length,
        "precision": precision_of(machine),
        "jobs": 2,
    }
    given |= others
    return Batch(config.gpt(), **given | {"sequences": given["sequences"] // pieces})


def healthy(config: Config, machine: Machine, pieces: int = 1, **others: Any) -> float:
    """Seconds of a step, its batch in so many pieces; others: as in ``batch_of``."""
    batch = batch_of(config, machine, pieces, **others)
    both = forward(batch, machine).total + backward(batch, machine).total
    return pieces * both + update(batch, machine)


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
        # A turn of the loop; a comparison, a product and a sum; a module's function, found there as an item
        # is, whose arguments become a tuple, which costs as much as an empty call.
        each = machine["python_step_s"] + 3 * machine["python_operation_s"]
        each += machine["python_function_s"] + machine["python_item_s"] + machine["python_call_s"]
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
        passes = UNFUSED_HIDDEN * 4 * states + UNFUSED_STATES * states
        moved = 2 * gpt.layers * passes + UNFUSED_UPDATE * parameters(gpt)
        more = moved / bandwidth(batch_of(config, machine), machine)
        return Seconds(plain, more, f"{moved / 1e6:.3g} MB more are read and written")
    if group == "memory_capacity":
        deeper = replace(config, layers=DEEPER * config.layers)
        deep, again = healthy(deeper, machine), forward(batch_of(deeper, machine), machine).total
        return Seconds(deep, 0.0 if fault else again, "" if fault else "forward once more")
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
        busy = healthy(config, machine, pieces, sequences=share, ranks=config.ranks)
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
    "dispatch": "attention's backward pass, whose small products are mostly calls; autograd's part of a call",
    "allocator": "malloc_trim's own walk over all that is free; the mended job's steps come between those of "
    "the faulty one, and fault in what it gave back",
    "memory_bandwidth": "how much of a step the last cache holds, which other machines of the host share",
    "memory_capacity": "fewer activations are kept, so that the last cache holds more of a step",
    "compute_precision": "operands that are brought into the library's order; conversions between the types",
    "oversubscription": "threads that spin before they sleep take the core from those which have work",
    "communication": "gloo wakes a process and two threads for each message: a busy machine is late",
    "straggler": "ranks that share caches and memory; copies into buckets",
    "none": "how much of a step the last cache holds, which other machines of the host share; in attention's "
    "backward pass, products that add to a gradient take longer than others as small",
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
