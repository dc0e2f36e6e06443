"""Seconds of a training step of a GPT on a CPU, part by part, forward and backward.

products     three of a linear layer, as large: FLOPs / the library's rate for so many + operands / bandwidth
attention    a block of queries and keys of one head at a time (torch's FlashAttentionKernel.cpp): 2 products
             forward and 5 backward, and an exponential of each score in both
activations  TRIPS x what is kept / bandwidth, and the exponentials of GELU and of the loss
calls        operators x AUTOGRAD x cost of a call
update       28 B x parameters / bandwidth

Of GPT-2's kind: GELU, and as many heads of keys as of queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from labs.machine import Machine

if TYPE_CHECKING:
    from labs.models.configuration import GPTConfig

QUERIES, KEYS = ((768, 256), (192, 64), (0, 32)), 512
"""In a block of attention: queries by the least length of a sequence, and keys."""
SUMMED = 3
"""Products of a block in backward that add to a gradient. Those are in the type of the batch; the other
four of a block are summed in float32 by MKL, where small ones in 16 bits take as long as in 32."""
LEAST = 2.0 * 64**3
"""FLOPs of a product in 16 bits that takes oneDNN as long as smaller ones: nearly all is the call."""
TRIPS = 2, 3
"""Of a kept tensor: written and read on; read in backward, its gradient written and read."""
GELU = 2, 3
"""Exponentials as long: an error function (one, and a polynomial as long); in backward its density too."""
AUTOGRAD = 2  # times as long as plain calls: each is recorded, and its node run
STATE_BYTES = 16  # of a parameter: itself, gradient, two moments
ADAMW_BYTES = 28  # of a parameter: all of these read, all but the gradient written
CALLS = {
    ("float32", True): (476, 143),
    ("float32", False): (386, 134),
    ("bfloat16", True): (626, 167),
    ("bfloat16", False): (488, 158),
}
"""By type and whether layers have biases: operators of a block and of the rest of a step (torch.profiler)."""


@dataclass(frozen=True)
class Batch:
    """What is computed at once: a batch, or each of the pieces that it is divided into.

    precision: of products. threads: 0 for all cores. jobs: of a process, which take turns step by step.
    ranks: processes of the host that train at once.
    """

    gpt: GPTConfig
    sequences: int
    length: int
    precision: str
    threads: int = 1
    jobs: int = 1
    ranks: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def size(self) -> int:
        """Bytes of a number that products read."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class Pass:
    """Seconds of a pass, forward or backward, by part."""

    products: float
    attention: float
    activations: float
    calls: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.activations + self.calls


def forward(batch: Batch, machine: Machine) -> Pass:
    return _pass(batch, machine, 0)


def backward(batch: Batch, machine: Machine) -> Pass:
    return _pass(batch, machine, 1)


def _pass(batch: Batch, machine: Machine, way: int) -> Pass:
    from labs.models.formulas import activation_bytes

    gpt = batch.gpt
    kept = activation_bytes(gpt, batch.sequences, batch.length)
    exponentials = batch.tokens * (GELU[way] * gpt.layers * gpt.size_of_hidden + gpt.vocabulary)
    return Pass(
        products=(1 + way) * sum(linear(batch, machine, *each) for each in _layers(gpt)),
        attention=gpt.layers * attention(batch, machine, way),
        activations=TRIPS[way] * kept / bandwidth(batch, machine)
        + exponentials * machine["packed_exp_s"] / _threads(batch, machine),
        calls=calls(batch, machine) * TRIPS[way] / sum(TRIPS),  # divided as trips are
    )


def calls(batch: Batch, machine: Machine) -> float:
    """Of all operators of a step, forward and backward."""
    of_block, others = CALLS[batch.precision, batch.gpt.bias]
    return (of_block * batch.gpt.layers + others) * AUTOGRAD * machine["torch_call_s"]


def _layers(gpt: GPTConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of every linear layer."""
    width, hidden = gpt.width, gpt.size_of_hidden
    block = [*[(width, width)] * 4, (width, hidden), (hidden, width)]
    return [*block * gpt.layers, (width, gpt.vocabulary)]


def linear(batch: Batch, machine: Machine, inputs: int, outputs: int) -> float:
    """A product of a linear layer, with its operands and what comes out brought through the caches."""
    moved = batch.size * (batch.tokens * (inputs + outputs) + inputs * outputs)
    return product(2.0 * batch.tokens * inputs * outputs, batch, machine) + moved / bandwidth(batch, machine)


def bandwidth(batch: Batch, machine: Machine) -> float:
    """Of what is touched before a step comes to the same memory again: parameters, gradients and moments of
    all jobs, and the activations and their gradients, in memory that all use. Ranks share the last cache."""
    from labs.models.formulas import activation_bytes, parameters

    states = batch.jobs * STATE_BYTES * parameters(batch.gpt)
    touched = states + 2 * activation_bytes(batch.gpt, batch.sequences, batch.length)
    return machine.bandwidth(batch.ranks * touched, threads=batch.threads)


def product(flops: float, batch: Batch, machine: Machine) -> float:
    flops = max(flops, LEAST) if batch.precision == "bfloat16" else flops
    return flops / machine.product_rate(flops, batch.precision, threads=batch.threads)


def attention(batch: Batch, machine: Machine, way: int) -> float:
    """Of one layer, forward (0) or backward (1). Blocks are divided among threads, not their products."""
    gpt, length, alone = batch.gpt, batch.length, replace(batch, threads=1)
    queries = min(next(count for least, count in QUERIES if length >= least), length)
    keys = min(KEYS, length)
    blocks = -(-length // queries) * -(-length // keys) * batch.sequences * gpt.heads
    flops = 2.0 * queries * keys * gpt.size_of_head
    each = 2 * flops / machine.product_rate(flops, "float32")
    each += SUMMED * way * product(flops, alone, machine)
    return blocks * (each + queries * keys * machine["packed_exp_s"]) / _threads(batch, machine)


def _threads(batch: Batch, machine: Machine) -> int:
    return batch.threads or machine.cores


def step(batch: Batch, machine: Machine, updated: float = 1.0) -> float:
    """Forward, backward and update of this share of the parameters."""
    passes = forward(batch, machine).total + backward(batch, machine).total
    return passes + updated * update(batch, machine)


def update(batch: Batch, machine: Machine) -> float:
    """AdamW, in one pass."""
    from labs.models.formulas import parameters

    return ADAMW_BYTES * parameters(batch.gpt) / bandwidth(batch, machine)
