"""kernels/streaming: which outputs are stored past the caches."""

import importlib

import pytest
import torch

from kernels import streaming
from kernels.simd import STREAM_BYTES


@pytest.mark.parametrize(
    ("second", "last", "least"),
    [
        (2 << 20, 480 << 20, 80 << 20),  # a part of a large last level
        (2 << 20, 12 << 20, 8 << 20),  # more than the second level of two cores, if that holds more
        (1 << 20, 0, 4 << 20),  # or if the system does not say
    ],
)
def test_what_the_last_level_holds_is_kept_for_its_reader(monkeypatch, second, last, least):
    monkeypatch.setattr("kernels.caches.second_level_bytes", lambda: second)
    monkeypatch.setattr("kernels.caches.last_level_bytes", lambda: last)
    monkeypatch.setattr("kernels.cores.usable_cores", lambda: 2)
    try:
        importlib.reload(streaming)
        assert least == streaming.STREAMED_BYTES
    finally:
        monkeypatch.undo()
        importlib.reload(streaming)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_is_counted_in_bytes_of_the_output(dtype, monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED_BYTES", 1024)
    least = 1024 // dtype.itemsize
    assert not streaming.is_large(torch.empty(least - 1, dtype=dtype))
    assert streaming.is_large(torch.empty(least, dtype=dtype))


def test_only_large_outputs_whose_rows_begin_on_a_line_are_streamed(monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED_BYTES", 1024)
    memory = torch.zeros(64, 64)
    first = -memory.data_ptr() % STREAM_BYTES // 4
    aligned = memory.view(-1)[first : first + 32 * 64].view(32, 64)
    shifted = memory.view(-1)[first + 1 : first + 1 + 32 * 64].view(32, 64)
    assert streaming.is_streamed(aligned, 64)
    assert not streaming.is_streamed(shifted, 64)
    assert not streaming.is_streamed(aligned[:1], 64)
    assert not streaming.is_streamed(aligned, 63)
