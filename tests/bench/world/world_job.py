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


def raises_before_a_reduction():
    """Rank 1 raises where rank 0 waits for it."""
    reduce = reduce_small()

    def step():
        if dist.get_rank() == 1:
            raise ValueError("planted on rank 1")
        return reduce()

    return step


def raises_everywhere():
    def step():
        raise ValueError("planted on every rank")

    return step


def hangs():
    return lambda: time.sleep(60 * dist.get_rank())


def unsendable():
    """Its output holds what pickle refuses."""
    return lambda: lambda: None


class Closable:
    """A step that bears to be closed once."""

    closed = False

    def __call__(self):
        return self.closed

    def close(self):
        if self.closed:
            raise RuntimeError("closed before")
        self.closed = True


class Good:
    """Counts on its rank how many of its kind were closed."""

    closed = 0

    def __call__(self):
        pass

    def close(self):
        Good.closed += 1


class Bad(Good):
    def __call__(self):
        raise RuntimeError("planted")


def closed():
    return lambda: Good.closed
