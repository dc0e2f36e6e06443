"""Live bytes are counted exactly: against allocations that are known."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel import memory
from parallel.memory import tracked
from parallel.memory_held import Memory, held_bytes

FLOAT = 4


def test_total():
    assert Memory(parameters=1, gradients=10, optimizer=100, buffers=1000).total == 1111
    assert Memory(1, 2, 3).total == 6


def test_a_storage_is_held_once():
    base = torch.empty(10, 10)
    empty = torch.empty(0)
    assert held_bytes([base, base.view(-1), base[2:], nn.Parameter(base), empty, empty]) == 400
    assert held_bytes([base, base.clone(), torch.empty(3, dtype=torch.bfloat16)]) == 806
    assert held_bytes([base[2:]]) == 400, "a view holds the whole of its storage"


def test_peak_and_live():
    before = torch.empty(1000)
    with tracked() as tracker:
        one = torch.empty(100)
        two = torch.empty(200)
        del one
        three = torch.empty(50)
    assert tracker.peak_bytes == 300 * FLOAT
    assert tracker.live_bytes == (two.numel() + three.numel()) * FLOAT
    with tracked() as tracker:
        del before, two, three
        torch.empty(10)
    assert tracker.live_bytes == -1250 * FLOAT, "what was there before and is freed now counts"
    assert tracker.peak_bytes == 0
    with tracked() as tracker:
        pass
    assert (tracker.peak_bytes, tracker.live_bytes) == (0, 0)


def test_other_threads_count():
    kept = []

    def allocate():
        kept.append(torch.empty(1 << 16, dtype=torch.uint8))

    old = [torch.empty(1 << 10, dtype=torch.uint8)]
    with tracked() as tracker:
        for target in (allocate, old.clear):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        torch.empty(1)
    assert tracker.live_bytes == (1 << 16) - (1 << 10)
    assert tracker.peak_bytes == (1 << 16) - (1 << 10) + FLOAT


@torch.library.custom_op("perflab_test::negated", mutates_args=())
def negated(value: torch.Tensor) -> torch.Tensor:
    buffer = torch.empty(3 * value.numel())
    return buffer[: value.numel()].copy_(value).neg()


def test_buffers_inside_operations_count():
    value = torch.ones(1000)
    with tracked() as tracker:
        result = negated(value)
    assert tracker.live_bytes == 1000 * FLOAT
    assert tracker.peak_bytes == 4000 * FLOAT
    del result
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    with tracked() as tracker:
        torch.addmm(left, left, right)
    assert tracker.peak_bytes == 64 * 64 * FLOAT


@pytest.mark.parametrize("saves", [False, True])
def test_a_step_peaks_where_arithmetic_says(saves):
    """n layers of relu-free linear maps: activations are kept until backward, unless recomputed."""
    width, rows, depth = 32, 128, 4
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    inputs = torch.randn(rows, width, requires_grad=True)
    activation, weight = rows * width * FLOAT, width * width * FLOAT

    def step():
        hidden = inputs
        for layer in net:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if saves else layer(hidden)
        hidden.backward(torch.ones_like(hidden))

    with tracked() as tracker:
        step()
    assert tracker.live_bytes == depth * weight + activation, "gradients of the weights and of the inputs"
    assert depth * activation <= tracker.peak_bytes <= (depth + 3) * activation + depth * weight
    with tracked() as tracker:
        net.zero_grad()
        inputs.grad = None
    assert tracker.live_bytes == -(depth * weight + activation)
    assert tracker.peak_bytes == 0


def test_an_error_inside_is_not_hidden_and_the_next_count_is_right():
    kept, tracker = None, None

    def fails():
        nonlocal kept, tracker
        with tracked() as tracker:
            kept = torch.empty(5)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert tracker.live_bytes == kept.numel() * FLOAT
    with tracked() as tracker:
        kept = torch.empty(7)
    assert tracker.live_bytes == 2 * FLOAT


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="not on meta"), tracked("meta"):
        pass
    with pytest.raises(RuntimeError, match="a profiler is running already"), tracked(), tracked():
        pass
    assert memory._SWITCHED_ON


@pytest.mark.gpu
def test_on_a_device():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    with tracked("cuda") as tracker:
        one = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        two = torch.empty(1 << 21, dtype=torch.uint8, device="cuda")
        del one
    assert tracker.peak_bytes == 3 << 20
    assert tracker.live_bytes == two.numel()
