"""kernels/rotary: layouts, errors, mixed dtypes, and that the vectors are real."""

import pytest
import torch

import kernels
from kernels.inspect import inspect_function
from kernels.rotary import cpu, eager
from kernels.rotary.spec import tables
from kernels.simd import host_features

pytestmark = pytest.mark.usefixtures("every_size")


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_undoes_it_and_keeps_lengths(interleaved):
    x, (cos, sin) = torch.randn(3, 29, 74), tables(29, 37)
    turned = kernels.rotary_embedding(x, cos, sin, interleaved)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(kernels.rotary_embedding(turned, cos, -sin, interleaved), x)


def test_layout_in_memory_is_kept_and_gradients_may_have_another():
    x, (cos, sin) = torch.randn(2, 5, 3, 32).transpose(1, 2).requires_grad_(), tables(5, 16)
    out = kernels.rotary_embedding(x, cos, sin)
    assert out.stride() == x.stride()
    grad = torch.randn(2, 3, 5, 32)
    torch.testing.assert_close(out, eager(x, cos, sin))
    torch.testing.assert_close(
        torch.autograd.grad(out, x, grad), torch.autograd.grad(eager(x, cos, sin), x, grad)
    )
    part = torch.randn(2, 3, 5, 96)[..., 32:64]  # the queries inside a projection
    torch.testing.assert_close(kernels.rotary_embedding(part, cos, sin), eager(part, cos, sin))


def test_tables_may_be_float32_beside_bfloat16():
    x, (cos, sin) = torch.randn(7, 64).bfloat16(), tables(7, 32)
    out = kernels.rotary_embedding(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, eager(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        ((4, 7), (4, 3), "even dim"),
        ((8,), (1, 4), r"\(\.\.\., length, dim\)"),
        ((2, 4, 8), (5, 4), r"\(4, 4\).*\(5, 4\)"),
        ((4, 8), (4, 8), r"dim / 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, table, message):
    with pytest.raises(ValueError, match=message):
        kernels.rotary_embedding(torch.ones(x), torch.ones(table), torch.ones(table))


def test_tables_that_want_a_gradient_are_refused():
    cos, sin = (table.requires_grad_() for table in tables(4, 4))
    with pytest.raises(ValueError, match="detach"):
        kernels.rotary_embedding(torch.ones(4, 8), cos, sin)


@pytest.mark.skipif("avx512f" not in host_features(), reason="512-bit registers are AVX-512's")
def test_sixteen_pairs_are_turned_in_512_bit_registers():
    cpu.rotate(torch.ones(3, 64), *tables(3, 32), False, False)
    types = next(t for t in cpu._rotate.signatures if t[2].dtype.name == "float32")
    code = inspect_function(cpu._rotate.compiled, types)
    assert code.vector_bits == 512
    assert code.packed_fma >= 4
    assert not code.libm
    assert code.float64 <= 2  # the sign, once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_tensors_are_computed_in_float32_too(monkeypatch, dtype):
    """Where torch's operations serve: rounded once, as the kernels do."""
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: 1 << 40)
    x, (cos, sin) = torch.randn(3, 7, 64).to(dtype), (table.to(dtype) for table in tables(7, 32))
    out = kernels.rotary_embedding(x, cos, sin)
    assert torch.equal(out, eager(x.float(), cos.float(), sin.float()).to(dtype))
