"""Ring attention and Ulysses equal attention on one process, and move and hold what they predict."""

import functools
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankFailed

from parallel import context, memory, ulysses
from parallel.attention_block import block_backward
from parallel.context import ring_attention, sequence_partition
from parallel.partition import split
from parallel.ulysses import ulysses_attention

STRATEGIES = {"ring": ring_attention, "ulysses": ulysses_attention}


def whole(batch, heads, kv_heads, length, dim, dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, count, length, dim) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def partition_of(strategy, length, is_causal):
    world = dist.get_world_size()
    return sequence_partition(length, world, is_causal) if strategy == "ring" else split(length, world)


def reference(tensors, is_causal, scale, dtype):
    query, key, value, grad = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*leaves, is_causal=is_causal, scale=scale, enable_gqa=True)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def compared(strategy, sizes, dtype, is_causal, scale=None):
    """For output and the three gradients: (error, error of torch on one process), both against float64."""
    tensors = whole(*sizes, dtype)
    expected = reference(tensors, is_causal, scale, torch.float64)
    same_dtype = reference(tensors, is_causal, scale, dtype)
    partition = partition_of(strategy, sizes[3], is_causal)
    own = [partition.take(tensor, dist.get_rank(), 2).clone() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in own[:3]]
    output = STRATEGIES[strategy](*leaves, is_causal=is_causal, scale=scale, enable_gqa=True)
    found = output.detach(), *torch.autograd.grad(output, leaves, own[3])
    assert output.dtype == dtype
    assert all(grad.dtype == dtype for grad in found)
    errors = []
    for ours, theirs, truth in zip(found, same_dtype, expected, strict=True):
        ours, truth_here = ours.double(), partition.take(truth, dist.get_rank(), 2)
        error = float((ours - truth_here).abs().max()) if ours.numel() else 0.0
        errors.append((error, float((theirs.double() - truth).abs().max()), float(truth.abs().max())))
    return errors


def all_compared(cases):
    return [compared(*case) for case in cases]


def cases_of(world):
    """Grouped and multi queries, lengths that 2 * world does not divide, lengths with empty shards."""
    sizes = [(2, 4, 4, 16, 8), (1, 8, 2, 29, 8), (2, 4, 1, 37, 16), (1, 6, 3, 61, 8)]
    if world == 4:
        sizes[3] = (1, 12, 3, 61, 8)
    for number, size in enumerate(sizes):
        for is_causal in (False, True):
            for strategy in STRATEGIES:
                yield strategy, size, torch.float64, is_causal, 0.3 if number == 1 else None
    for strategy in STRATEGIES:
        yield strategy, (1, 4, 2, 5, 4), torch.float64, True
        yield strategy, (1, 4, 2, 2, 4), torch.float64, False
        for dtype in (torch.float32, torch.bfloat16):
            for is_causal in (False, True):
                yield strategy, (2, 8, 4, 75, 16), dtype, is_causal


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_forward_and_backward_equal_one_process(ranks, world):
    cases = list(cases_of(world))
    for errors in ranks.run(world, all_compared, cases):
        for case, four in zip(cases, errors, strict=True):
            for error, of_torch, size in four:
                if case[2] == torch.float64:
                    assert error <= 1e-13 * max(size, 1), (case, four)
                else:
                    assert error <= 2 * of_torch, (case, four)


def counted(strategy, sizes, dtype, is_causal):
    """[(payload, prediction)] with the shapes exchanged and not, with backward and not."""
    from parallel import link

    batch, _, kv_heads, length, dim = sizes
    world, rank = dist.get_world_size(), dist.get_rank()
    partition = partition_of(strategy, length, is_causal)
    own = [partition.take(tensor, rank, 2).clone() for tensor in whole(*sizes, dtype)]
    leaves, found = [tensor.requires_grad_() for tensor in own[:3]], []
    for lengths in (None, partition.sizes):
        for backward in (True, False):
            with link.counted() as traffic:
                output = STRATEGIES[strategy](*leaves, is_causal=is_causal, enable_gqa=True, lengths=lengths)
                if backward:
                    output.backward(own[3])
            options = {"backward": backward, "exchanged": lengths is None}
            if strategy == "ring":
                wanted = context.predict_communication(
                    batch, kv_heads, length, dim, dtype.itemsize, world, rank, is_causal, **options
                )
            else:
                wanted = ulysses.predict_communication(*sizes, dtype.itemsize, world, rank, **options)
            found.append((dict(traffic.payload), wanted))
    return found


def all_counted(cases):
    return [counted(*case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_communication_is_what_is_predicted(ranks, world):
    cases = [
        (strategy, sizes, dtype, is_causal)
        for strategy in STRATEGIES
        for sizes, dtype in (((2, 4, 2, 16, 8), torch.float32), ((1, 6, 1, 29, 8), torch.bfloat16))
        for is_causal in (False, True)
    ]
    for results in ranks.run(world, all_counted, cases, backend="link"):
        for case, found in zip(cases, results, strict=True):
            for payload, wanted in found:
                assert payload == wanted, case
                assert world == 1 or sum(payload.values()) > 0


def wrong_calls():
    """The message of each wrong call, which every rank must get."""
    rank = dist.get_rank()
    x = torch.randn(1, 4, 8, 8)
    longer, wider = torch.randn(1, 4, 9, 8), torch.randn(1, 4, 8, 16)
    mine = [
        ((longer,) * 3 if rank else (x,) * 3, {"is_causal": True}),
        ((wider,) * 3 if rank else (x,) * 3, {}),
        ((x,) * 3, {"is_causal": bool(rank)}),
        ((x.double(),) * 3 if rank else (x,) * 3, {}),
        ((x, longer, longer) if rank else (x,) * 3, {}),
        ((x, x[:, :2], x[:, :2]), {}),
        ((x,) * 3, {"attn_mask": torch.ones(8, 8, dtype=torch.bool)}),
        ((x,) * 3, {"dropout_p": 0.1}),
        ((x,) * 3, {"lengths": [8]}),
    ]
    messages = []
    for function in (ring_attention, ulysses_attention):
        for tensors, options in mine:
            try:
                function(*tensors, **options)
                messages.append("")
            except ValueError as error:
                messages.append(str(error))
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="leave a rank of 2 without a head"):
        ulysses_attention(x, x, x)
    return messages


def test_wrong_calls_are_errors_on_every_rank(ranks):
    first, second = ranks.run(2, wrong_calls)
    expected = [
        r"hold \[8, 9\] of a sequence of 17; in zig-zag order it is split as \[9, 8\]",
        "rank 1 has \\(1, 4, 4, 16\\)",
        "rank 1 has .*True",
        "rank 1 has .*float64",
        "do not fit",
        "enable_gqa a divisor",
        "a mask or dropout",
        "dropout_p=0.1",
        r"lengths=\[8\] are not those of 2 ranks",
    ]
    for number, message in enumerate(first):
        if number == len(expected):
            assert not message  # Ulysses takes shards of any length
            continue
        pattern = expected[number % len(expected)]
        assert re.search(pattern, message), (number, message)
        assert re.search(pattern, second[number]), (number, second[number])


def one_rank_dies():
    x = torch.randn(1, 2, 4096, 8)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ring_attention(x, x, x, is_causal=True)


def test_a_dead_rank_is_an_error_of_the_others(ranks):
    with pytest.raises(RankFailed, match=r"rank 0 of 2: .*Error"):
        ranks.run(2, one_rank_dies, expect_death={1}, timeout=10)


def in_subgroups():
    """Two rings of two ranks side by side, each with a sequence of its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    group, other = groups[rank % 2], rank % 2
    tensors = [tensor + other for tensor in whole(1, 4, 2, 13, 8, torch.float64)]
    expected = reference(tensors, True, None, torch.float64)
    worst = 0.0
    for strategy, function in STRATEGIES.items():
        partition = sequence_partition(13, 2, True) if strategy == "ring" else split(13, 2)
        own = [partition.take(tensor, rank // 2, 2).clone() for tensor in tensors]
        leaves = [tensor.requires_grad_() for tensor in own[:3]]
        output = function(*leaves, is_causal=True, enable_gqa=True, group=group)
        found = output.detach(), *torch.autograd.grad(output, leaves, own[3])
        for ours, truth in zip(found, expected, strict=True):
            worst = max(worst, float((ours - partition.take(truth, rank // 2, 2)).abs().max()))
    return worst


def test_rings_in_subgroups(ranks):
    assert max(ranks.run(4, in_subgroups)) < 1e-13


def held(sizes, dtype, is_causal):
    """(peak of the backward, prediction) in bytes; what one block takes by itself is measured on its own."""
    batch, heads, kv_heads, length, dim = sizes
    world, rank = dist.get_world_size(), dist.get_rank()

    @functools.cache
    def workspace(queries, keys):
        query, grad, output = (torch.randn(batch, heads, queries, dim).to(dtype) for _ in range(3))
        key, value = torch.randn(2, batch, kv_heads, keys, dim).to(dtype)
        statistics = torch.zeros(batch, heads, queries, dtype=torch.promote_types(dtype, torch.float32))
        call = functools.partial(block_backward, grad, query, key, value, output, statistics, False, 1.0)
        call()
        with memory.tracked() as tracker:
            call()
        # In the ring, halves of a shard are copied to be contiguous.
        whole_queries, whole_keys = queries == shard, keys == shard
        copied = 0 if whole_queries else 3 * query.nbytes + statistics.nbytes
        copied += 0 if whole_keys else 2 * key.nbytes
        return tracker.peak_bytes + copied

    partition = sequence_partition(length, world, is_causal)
    shard = partition.sizes[rank]
    own = [partition.take(tensor, rank, 2).clone() for tensor in whole(*sizes, dtype)]
    leaves = [tensor.requires_grad_() for tensor in own[:3]]
    output = ring_attention(*leaves, is_causal=is_causal, enable_gqa=True)
    with memory.tracked() as tracker:
        output.backward(own[3])
    wanted = context.predict_memory(*sizes, dtype.itemsize, world, rank, is_causal, workspace)
    return tracker.peak_bytes, wanted.total


def all_held(cases):
    return [held(*case) for case in cases]


@pytest.mark.parametrize("world", [2, 3])
def test_memory_is_what_is_predicted(ranks, world):
    cases = [((2, 8, 2, 384, 32), torch.float32, is_causal) for is_causal in (False, True)]
    # Over shm the thread that has moved a block may hold it for an instant longer than the ring does.
    for found in ranks.run(world, all_held, cases, backend="gloo"):
        for case, (peak, wanted) in zip(cases, found, strict=True):
            assert abs(peak - wanted) < 0.01 * wanted, (case, peak, wanted)
