"""kernels/prefetching.py, kernels/blocks.py: what is asked for ahead, and that loops stay whole."""

import platform
import re

import pytest
import torch

from kernels.activation import cpu_elementwise, cpu_softmax, cpu_swiglu
from kernels.activation.formulas import FAMILY
from kernels.blocks import BLOCK, part_of, read_ahead, stream, write_ahead
from kernels.inspect import assembly_of
from kernels.normalization import cpu, cpu_backward
from kernels.prefetching import AHEAD_BYTES, prefetch, prefetch_to_write, rows_ahead
from kernels.rotary import cpu as rotary
from kernels.simd import store_fence
from kernels.threads import calls_in, chunked


@chunked
def ask(chunk, array):
    for place in (0, array.size - 1, 10**12):  # the last lies in no memory of ours
        prefetch(array, place)
        prefetch_to_write(array, place)
    read_ahead(array, array.size)
    write_ahead(array, array.size)


@chunked
def streamed_copy(chunk, source, out):
    for at in range(0, out.size, BLOCK):
        stream(source[at : at + BLOCK], out, at)
    store_fence()


def test_asking_changes_nothing_and_may_go_past_the_end():
    array = torch.arange(100, dtype=torch.float32)
    ask(1, array)
    assert torch.equal(array, torch.arange(100, dtype=torch.float32))


@pytest.mark.parametrize("size", [0, 16, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_a_block_is_streamed_whole(size):
    source, memory = torch.randn(size), torch.zeros(size + 32)
    first = -memory.data_ptr() % 64 // 4
    out = memory[first : first + size]
    streamed_copy(1, source, out)
    assert torch.equal(out, source)
    assert memory[first + size :].count_nonzero() == 0


@pytest.mark.parametrize("size", [0, 1, 15, 16, 1000, 40_007])
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_parts_are_all_elements_once_and_begin_at_lanes(size, chunks):
    parts = [part_of(size, chunk, chunks) for chunk in range(chunks)]
    assert [place for first, end in parts for place in range(first, end)] == list(range(size))
    assert all(first % 16 == 0 for first, _ in parts)


def test_rows_are_asked_for_far_enough_ahead_and_only_where_they_are_far(monkeypatch):
    monkeypatch.setattr("kernels.prefetching.second_level_bytes", lambda: 1 << 20)
    large, near = torch.empty(1025, 256), torch.empty(1024, 256)
    assert rows_ahead(large, 256) == AHEAD_BYTES // 4  # eight rows of a KiB
    assert rows_ahead(near, 256) == 0
    assert rows_ahead(torch.empty(300, 3000), 3000) == 3000  # one long row
    assert rows_ahead(large.bfloat16().repeat(3, 1), 256) == AHEAD_BYTES // 2


def _bodies():
    """Every body that writes as much as it reads, and which of its arguments are there."""
    x, up, weight = torch.randn(40, 256), torch.randn(40, 256), torch.rand(256)
    mean, rstd = torch.zeros(40), torch.ones(40)
    works = {
        "norm": lambda: cpu.forward(x, up, weight, weight, 256, 1e-5, True),
        "norm backward": lambda: cpu_backward.backward(
            x, None, up, mean, rstd, weight, 256, True, True, True
        ),
        "softmax": lambda: cpu_softmax.softmax(x),
        "softmax backward": lambda: cpu_softmax.softmax_backward(x, up),
        "swiglu": lambda: cpu_swiglu.swiglu(x, up),
        "swiglu backward": lambda: cpu_swiglu.swiglu_backward(x, x, up),
        "rotary": lambda: rotary.rotate(x, torch.ones(40, 128), torch.ones(40, 128), False, False),
    }
    for name in FAMILY:
        parameters = (1.0,) * len(FAMILY[name].parameters)
        works[name] = lambda name=name, given=parameters: cpu_elementwise.forward(name)(x, *given)
        works[f"{name} backward"] = lambda name=name, given=parameters: cpu_elementwise.backward(name)(
            x, up, *given
        )
    return works


READ = {"norm": 2, "norm backward": 2, "softmax backward": 2, "swiglu": 2, "swiglu backward": 3, "rotary": 4}
WRITTEN = {"norm": 2, "swiglu backward": 2, "rotary": 4}
"""Places that are asked for, where it is not one: tensors, and of rotary's two pairings two halves each."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of x86's instructions")
@pytest.mark.parametrize("name", _bodies())
def test_each_loop_asks_ahead_to_read_and_to_write(name):
    found = [
        assembly_of(body.compiled, types)
        for body, signatures in calls_in(_bodies()[name]).items()
        for types in signatures
    ]
    most = max(found, key=len)  # a backward pass also sums rows, which is another body
    assert len(re.findall(r"\bprefetch(?:w|t0)\b", most)) >= WRITTEN.get(name, 1)
    read = 2 if name.endswith(" backward") else 1
    assert len(re.findall(r"\bprefetcht1\b", most)) >= READ.get(name, read)
