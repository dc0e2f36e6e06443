"""What the ranks of a test's world run."""

import time

import torch
import torch.distributed as dist


def reduce_small():
    values = torch.ones(1000) * (dist.get_rank() + 1)

    def step():
        total = values.clone()
        dist.all_reduce(total)
        return total

    return step


def late_rank():
    """Rank 1 takes 30 ms."""
    return lambda: time.sleep(0.03 * dist.get_rank())


def raises():
    def step():
        if dist.get_rank() == 1:
            raise ValueError("planted on rank 1")

    return step


def hangs():
    return lambda: time.sleep(60 * dist.get_rank())
