"""Ring attention and Ulysses equal attention on one process, forward and backward, and move what they predict."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankFailed

from parallel import context, ulysses
from parallel.context import ring_attention, sequence_partition, zigzag
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
    output = STRATEGIES[strategy](*leaves, is_causal=is_causal, scale=scale)
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
