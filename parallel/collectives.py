"""The collectives of torch.distributed, from send and receive: which to use when, and what each costs.

Names, arguments and results of these eight functions are torch.distributed's (``dst`` and ``src`` are global
ranks), so that one can take the place of the other. Besides there are ``algorithm`` (collective_costs.py says
what each costs; by default the cheapest for gloo on one host) and ``checked``.

When is which the right one? By who has what, and who needs what:

- broadcast: one has it, all need it. Initial weights, a configuration.
- scatter: one has it, each needs another part. Handing out a batch (``nn.DataParallel``).
- gather, its inverse: each has a part, one needs all. Collecting predictions or metrics on the rank that
  writes them. Both make the one the bottleneck: all n bytes pass its link, however many ranks there are,
  which is why training does without.
- reduce: each has a whole, one needs the sum. A loss for the log.
- all-reduce: each has a whole, all need the sum. Gradients of data parallelism. It is a reduce-scatter and an
  all-gather; whoever needs only his part of the sum stops half way:
- reduce-scatter: each has a whole, each needs another part of the sum. Gradients under ZeRO-2 and FSDP.
- all-gather: each has a part, all need the whole. Weights under FSDP before they are used. n/p bytes in, n
  out: its price is memory.
- all-to-all: each has something for each. Tokens to their experts and back; sequence shards to head shards.

Which algorithm? Short vectors cost latency, long ones bytes: a tree takes ceil(log2 p) rounds but carries
the whole vector in each; a ring takes p-1 but carries n/p; halving-doubling has the rounds of the one and
the bytes of the other, if p is a power of two, and is never worse than the tree all-reduce, which stands
here as the plain version. ``collective_costs.choose`` compares.

Asynchronous or not? ``async_op=True`` returns a ``Handle``; compute that does not need the result can run
before ``wait()``, and the step then takes max(compute, communication) and not their sum. It pays where the
link is the limit; where sending costs the same processor that computes, there is less to hide.

Results: bit for bit the same on all ranks, and the same in every run, since the order of each reduction is
fixed (it depends on algorithm and world size). Reductions are made in the tensors' own dtype: a bfloat16
ring rounds after every rank. Widen before, if that matters.

Wrong arguments: with ``checked`` (the default) the ranks first tell each other what they were called with
(point_to_point.agree, ceil(log2 p) messages of some 56 bytes), and if it does not fit all raise a ValueError
that names the rank. Without, shapes that differ are undefined behaviour as in torch.distributed; a rank that
does not come is a RuntimeError after the group's time-out either way.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist

from parallel import collective_rings as rings
from parallel import collective_trees as trees
from parallel.collective_bytes import predict_communication
from parallel.collective_call import Call
from parallel.collective_costs import choose, cost
from parallel.point_to_point import Handle, Rounds, bruck_all_gather
from parallel.reductions import combiner

__all__ = [
    "Handle",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "choose",
    "cost",
    "gather",
    "predict_communication",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
]

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
Operation: TypeAlias = dist.ReduceOp.RedOpType
Group: TypeAlias = dist.ProcessGroup | None


def broadcast(
    tensor: torch.Tensor,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
    *,
    algorithm: str | None = None,
    checked: bool = True,
) -> Handle | None:
    """``tensor`` of rank ``src`` to that of all ranks; same shape and dtype everywhere."""
    call = Call("broadcast", tensor, group, algorithm, root=src)

    def rounds() -> Rounds:
        with call.flat(tensor) as flat:
            run = trees.broadcast if call.algorithm == "tree" else rings.scatter_all_gather_broadcast
            yield from call.shifted(run(flat, call.place, call.size))

    return call.start(rounds, async_op, checked)


def reduce(
    tensor: torch.Tensor,
    dst: int = 0,
    op: Operation = SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    algorithm: str | None = None,
    checked: bool = True,
) -> Handle | None:
    """``tensor`` of rank ``dst`` becomes the reduction of all; that of the others stays as it is."""
    call = Call("reduce", tensor, group, algorithm, op=op, root=dst)

    def rounds() -> Rounds:
        with call.flat(tensor) as flat:
            run = trees.reduce if call.algorithm == "tree" else rings.reduce_scatter_gather_reduce
            yield from call.shifted(run(flat, combiner(op), call.place, call.size))
            if op == AVG and call.place == 0:
                flat.div_(call.size)

    return call.start(rounds, async_op, checked)


def all_reduce(
    tensor: torch.Tensor,
    op: Operation = SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    algorithm: str | None = None,
    checked: bool = True,
) -> Handle | None:
    """``tensor`` of every rank becomes the reduction of all, with the same bits everywhere.

    algorithm: "ring", "halving_doubling" or "tree".
    """
    call = Call("all_reduce", tensor, group, algorithm, op=op)
    run = {
        "ring": rings.all_reduce,
        "halving_doubling": rings.halving_doubling_all_reduce,
        "tree": trees.all_reduce,
    }

    def rounds() -> Rounds:
        with call.flat(tensor) as flat:
            yield from run[call.algorithm](flat, combiner(op), call.rank, call.size)
            if op == AVG:
                flat.div_(call.size)

    return call.start(rounds, async_op, checked)


def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    *,
    algorithm: str | None = None,
    checked: bool = True,
) -> Handle | None:
    """``input_tensor`` of all ranks, one after another, to ``output_tensor`` (p times as many elements).

    algorithm: "ring" or "bruck".
    """
    call = Call("all_gather", output_tensor, group, algorithm)
    call.require_parts("output_tensor", output_tensor, "input_tensor", input_tensor)

    def rounds() -> Rounds:
        with call.flat(output_tensor) as flat:
            if call.algorithm == "bruck":
                blocks = flat.new_empty(call.size, input_tensor.numel())
                blocks[0] = input_tensor.reshape(-1)
                yield from bruck_all_gather(blocks, call.rank)
                flat.view_as(blocks).copy_(blocks.roll(call.rank, 0))
            else:
                parts = rings.chunks(flat, call.size)
                parts[call.rank].copy_(input_tensor.reshape(-1))
                yield from rings.all_gather(parts, call.rank)

    return call.start(rounds, async_op, checked)


def reduce_scatter_tensor(
    output: torch.Tensor,
    input: torch.Tensor,
    op: Operation = SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    checked: bool = True,
) -> Handle | None:
    """Part r of the reduction of all ranks' ``input`` to ``output`` of rank r. ``input`` stays as it is."""
    call = Call("reduce_scatter", input, group, None, op=op)
    call.require_parts("input", input, "output", output)

    def rounds() -> Rounds:
        parts = rings.chunks(input.detach().clone(memory_format=torch.contiguous_format).view(-1), call.size)
        yield from rings.reduce_scatter(parts, combiner(op), call.rank)
        output.copy_(parts[call.rank].view_as(output))
        if op == AVG:
            output.div_(call.size)

    return call.start(rounds, async_op, checked)


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    *,
    checked: bool = True,
) -> Handle | None:
    """Rows of ``input`` for rank i (``input_split_sizes[i]`` of them; default: as many for each) to rank i,
    whose ``output`` takes them in the order of the ranks they come from (``output_split_sizes``)."""
    call = Call("all_to_all", input, group, None)
    sent = call.require_splits("input", input, input_split_sizes)
    received = call.require_splits("output", output, output_split_sizes)
    call.require_like("output", output)

    def rounds() -> Rounds:
        with call.flat(output) as flat:
            pieces = [rows.reshape(-1) for rows in input.detach().contiguous().split(sent)]
            places = [rows.view(-1) for rows in flat.view_as(output).split(received)]
            yield from rings.all_to_all(places, pieces, call.rank)

    return call.start(rounds, async_op, checked, splits=(sent, received))


def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: Group = None,
    async_op: bool = False,
    *,
    checked: bool = True,
) -> Handle | None:
    """``tensor`` of rank i to ``gather_list[i]`` of rank ``dst``; the others give no list."""
    call = Call("gather", tensor, group, None, root=dst)
    call.require_list("gather_list", gather_list, tensor)

    def rounds() -> Rounds:
        edges = rings.bounds(tensor.numel() * call.size, call.size)
        held = tensor.new_empty(tensor.numel() * trees.subtree(call.place, call.size))
        held[: tensor.numel()] = tensor.reshape(-1)
        yield from call.shifted(trees.gather(held, edges, call.place, call.size))
        for rank, part in enumerate(gather_list or []):
            place = (rank - call.root) % call.size
            part.copy_(held[edges[place] : edges[place + 1]].view_as(part))

    return call.start(rounds, async_op, checked)


def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
    *,
    checked: bool = True,
) -> Handle | None:
    """``scatter_list[i]`` of rank ``src`` to ``tensor`` of rank i; the others give no list."""
    call = Call("scatter", tensor, group, None, root=src)
    call.require_list("scatter_list", scatter_list, tensor)

    def rounds() -> Rounds:
        edges = rings.bounds(tensor.numel() * call.size, call.size)
        if scatter_list:
            places = [scatter_list[(place + call.root) % call.size] for place in range(call.size)]
            held = torch.cat([part.reshape(-1) for part in places])
        else:
            held = tensor.new_empty(tensor.numel() * trees.subtree(call.place, call.size))
        yield from call.shifted(trees.scatter(held, edges, call.place, call.size))
        tensor.copy_(held[: tensor.numel()].view_as(tensor))

    return call.start(rounds, async_op, checked)
