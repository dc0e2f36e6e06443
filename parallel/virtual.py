"""Virtual devices: stages whose work is a set time, so that two cores show honestly how 4, 8, 16 behave.

A virtual stage computes next to nothing and sleeps, while the processor is free for the other ranks: what a
schedule's order costs, and what the runtime adds, shows as on that many devices. What is real: processes,
messages, autograd, the runtime. With ``link.wrap(..., latency=, seconds_per_byte=)`` the links are set, too.
What is not: memory, contention for it, and any speed. Whoever shows such a figure says that it is one.

A sleep ends a little late (the kernel's timer, the scheduler, a busy machine). That is left in: each stage
sleeps until its time after it was called, and what comes later is the runtime's or the machine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

NAP = 1e-3  # s: a sleep as short as this ends some 0.03 ms late, one of 25 ms 0.1 to 0.2
PR_SET_TIMERSLACK, SLACK = 29, 1  # ns by which the kernel may be late to save wake-ups, 50,000 by default


def sleep_until(when: float) -> None:
    """Until ``when`` of time.perf_counter, not before; at once if it is past. Nobody spins."""
    while (left := when - time.perf_counter()) > 0:
        time.sleep(left - NAP if left > 2 * NAP else left)


def wake_in_time() -> None:
    """From now on the kernel wakes this thread as exactly as it can (Linux; elsewhere nothing changes)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK, 0, 0, 0)


class _Sleeping(torch.autograd.Function):
    """Passes on what it is given, and in its backward sleeps so many seconds.

    last: shared by the two halves of a micro-batch, (backward, end) of the half before. Where one backward
    does both, the second begins when the first was to end, not when its sleep did: a full backward is one
    action, and late once.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float, last: list[tuple[int, float]]) -> torch.Tensor:
        ctx.seconds, ctx.last = seconds, last
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        task, begun = torch._C._current_graph_task_id(), time.perf_counter()
        if ctx.last and ctx.last[0][0] == task:
            begun = ctx.last[0][1]
        ctx.last[:] = [(task, begun + ctx.seconds)]
        sleep_until(begun + ctx.seconds)
        return gradient, None, None


class _Begin(nn.Module):
    """Where gradients begin in the first stage, which gets none: as an embedding, without work."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class VirtualStage(nn.Module):
    """y = x * weight, each part in a set time.

    forward, input_gradient, weight_gradient: seconds of each, whatever the micro-batch; a full backward takes
        the last two together. is_first: whether it is the first stage, which has no input gradient otherwise.
    x: (samples, ...) float32. ValueError: a time that is negative or not finite.
    """

    def __init__(
        self, forward: float, input_gradient: float, weight_gradient: float, is_first: bool = False
    ) -> None:
        super().__init__()
        for name, seconds in (
            ("forward", forward),
            ("input_gradient", input_gradient),
            ("weight_gradient", weight_gradient),
        ):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more; got {seconds}")
        wake_in_time()
        self.seconds = forward, input_gradient, weight_gradient
        self.begin = _Begin() if is_first else nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        begun = time.perf_counter()
        forward, input_gradient, weight_gradient = self.seconds
        last: list[tuple[int, float]] = []
        x = _Sleeping.apply(self.begin(x), input_gradient, last)
        y = x * _Sleeping.apply(self.weight, weight_gradient, last)
        sleep_until(begun + forward)
        return y


def virtual_stages(
    count: int, forward: float, input_gradient: float, weight_gradient: float
) -> list[nn.Module]:
    """``count`` stages that take the same seconds each."""
    return [
        VirtualStage(forward, input_gradient, weight_gradient, is_first=index == 0) for index in range(count)
    ]
