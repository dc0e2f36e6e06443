"""kernels/storage.py: 16-bit floats load exactly and store as torch rounds them, in SIMD."""

import numpy as np
import pytest
import torch

from kernels.inspect import inspect_function
from kernels.simd import full_width, vector_bits
from kernels.storage import narrow, widen
from kernels.threads import chunked


@chunked
def convert(chunk, source, target):
    full_width()
    for j in range(source.size):
        target[j] = narrow(widen(source[j]), target)


def converted(source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    convert(1, source, target)
    return target


def same(left, right):
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_patterns_load_exactly_and_come_back(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = converted(patterns, torch.float32)
    assert same(wide, patterns.float())
    assert same(converted(wide, dtype), patterns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stores_round_as_torch_does(dtype):
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    half = np.float32(1) + np.arange(4096, dtype=np.float32) * np.float32(2**-11)
    values = torch.from_numpy(np.concatenate([bits.view(np.float32), ties.view(np.float32), half]))
    assert same(converted(values, dtype), values.to(dtype))


def test_float64_passes_and_is_rounded_to_float32():
    values = torch.randn(100, dtype=torch.float64)
    assert torch.equal(converted(values, torch.float64), values)
    assert torch.equal(converted(values, torch.float32), values.float())


@pytest.mark.skipif(vector_bits() < 512, reason="this CPU has no 512-bit registers")
@pytest.mark.parametrize("signature", ["uint16[::1], float32[::1]", "float32[::1], uint16[::1]"])
def test_bfloat16_is_converted_sixteen_at_a_time(signature):
    found = inspect_function(convert.compiled, f"int64, {signature}")
    assert found.registers.get("zmm", 0) > 4, found.summary
    assert not found.libm


def test_half_precision_calls_no_library():
    found = inspect_function(convert.compiled, "int64, int16[::1], float32[::1]")
    assert not found.libm, found.summary
