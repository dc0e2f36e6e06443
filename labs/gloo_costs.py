"""What a collective of torch.distributed costs over gloo, between processes of one host.

    seconds = 2 hand-overs + messages in a row + exchanges in a row + bytes copied / copy bandwidth

The call is handed to a thread of c10d's, which runs gloo's algorithm and hands the result back. The
algorithm is gloo's own, one file each: a broadcast goes down a binomial tree; all-reduce, all-gather and the
first half of reduce go round a ring, in which every rank sends and receives at the same time. Gather and
scatter are the root's messages with each, and so is the end of reduce; an all-to-all is an exchange with
each. These are all begun before one is waited for: their latencies pass at the same time, and only their
bytes add up. There is no reduce-scatter: c10d makes an all-reduce of a copy and keeps a part. What c10d
copies besides: all-gather and gather fill a tensor of their own and copy it out. Segments overlap the sum
with the next bytes: it is left out, as in the alpha-beta model (parallel/collective_costs.py).

Sources: gloo, github.com/pytorch/gloo: allgather.cc, allreduce.cc, alltoall.cc, broadcast.cc, gather.cc,
reduce.cc, scatter.cc, and transport/tcp/pair.cc (the hand-shake of a message); PyTorch,
torch/csrc/distributed/c10d/ProcessGroupGloo.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from labs.machine import Machine

HAND_OVERS = 2  # to c10d's thread, and back
COPIED = {
    "all_gather": (2.0, 4.0),
    "all_to_all": (0.0, 2.0),
    "gather": (2.0, 2.0),
    "reduce_scatter": (2.0, 2.0),
    "scatter": (0.0, 2.0),
}
"""Bytes that c10d and gloo read and write on the busiest rank: a multiple of the whole vector, and of a part.

A copy reads and writes: 2. all_gather: the part twice, all once; gather: the root's part once, all once;
reduce_scatter: all once, the part once; the others: the part.
"""


@dataclass(frozen=True)
class Link:
    """alpha (s) and beta (s/B) of a message, and of an exchange, in which two ranks send at the same time."""

    message: tuple[float, float]
    exchange: tuple[float, float]

    def __str__(self) -> str:
        kinds = (("a message", self.message), ("an exchange", self.exchange))
        return " and ".join(f"{1e6 * a:.0f} us + {1e9 * b:.2g} ns/B {name}" for name, (a, b) in kinds)


def link(machine: Machine) -> Link:
    return Link(
        (machine["gloo_message_s"], machine["gloo_s_per_byte"]),
        (machine["gloo_exchange_s"], machine["gloo_exchange_s_per_byte"]),
    )


def transfer(operation: str, size: float, ranks: int, link: Link) -> float:
    """Seconds that gloo's messages take; ``size`` as in parallel/collective_costs.py."""
    from parallel.collective_costs import (
        direct_gather_cost,
        ring_all_gather_cost,
        ring_all_reduce_cost,
        ring_reduce_scatter_cost,
        tree_broadcast_cost,
    )

    def at_once(latency: float, seconds_per_byte: float) -> float:
        """With each other rank, all begun before one is waited for."""
        return latency + direct_gather_cost(size, ranks, 0.0, seconds_per_byte)

    if operation == "broadcast":
        return tree_broadcast_cost(size, ranks, *link.message)
    if operation in ("gather", "scatter"):
        return at_once(*link.message)
    if operation == "all_to_all":
        return at_once(*link.exchange)
    if operation == "reduce":
        return ring_reduce_scatter_cost(size, ranks, *link.exchange) + at_once(*link.message)
    exchanges = {
        "all_gather": ring_all_gather_cost,
        "all_reduce": ring_all_reduce_cost,
        "reduce_scatter": ring_all_reduce_cost,
    }
    return exchanges[operation](size, ranks, *link.exchange)


def copied(operation: str, size: float, ranks: int) -> float:
    """Bytes read and written besides."""
    whole, part = COPIED.get(operation, (0.0, 0.0))
    return whole * size + part * size / ranks


def seconds(machine: Machine, operation: str, size: float, ranks: int) -> float:
    """Of one call, where every rank has a core."""
    moved = copied(operation, size, ranks)
    copying = moved / machine.bandwidth(moved)
    handing = HAND_OVERS * machine["thread_switch_s"]
    return handing + transfer(operation, size, ranks, link(machine)) + copying
