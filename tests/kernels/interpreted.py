"""Run by test_interpreter.py under TRITON_INTERPRET=1: bfloat16 in the interpreter, and the way there."""

import warnings

import pytest
import torch
import triton
import triton.language as tl
from sample_gpu import layer_norm, matmul, norm
from triton.runtime import interpreter

from kernels.ahead_of_time import compile_for
from kernels.interpreter import repair
from kernels.op import register

pytestmark = pytest.mark.interpreted
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def repaired():
    repair()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_errs_by_one_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((100, 70), (70, 90)))
    c = torch.full((100, 90), torch.nan, dtype=dtype)
    matmul[(2, 2)](a, b, c, 100, 90, 70, 64, 64, 32)
    exact = a.double() @ b.double()
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-5  # one rounding, and the order of the sum
    assert ((c.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_and_its_transpose_have_the_same_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((32, 48), (48, 64)))
    product, transposed = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((32, 64), (64, 32)))
    matmul[(1, 1)](a, b, product, 32, 64, 48, 32, 64, 16)
    matmul[(2, 1)](b.T.contiguous(), a.T.contiguous(), transposed, 64, 32, 48, 32, 32, 16)
    assert torch.equal(product, transposed.T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_norm_errs_by_a_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((3, 100), (100,), (100,)))
    y = torch.full_like(x, torch.nan)
    layer_norm[(3,)](x, weight, bias, y, 100, 1e-5, 128)
    exact = torch.nn.functional.layer_norm(x.double(), (100,), weight.double(), bias.double())
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@triton.jit
def mix(x, y, out, of_halves, of_integers, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.where(a > b, a + b, a * b))
    tl.store(of_halves + at, a.to(tl.float16))
    tl.store(of_integers + at, a.to(tl.int32).to(tl.bfloat16))


def test_arithmetic_comparisons_and_conversions_of_bfloat16_are_torchs():
    generator = torch.Generator().manual_seed(0)
    x, y = (4 * torch.randn(512, generator=generator).bfloat16() for _ in range(2))
    out, halves, integers = torch.empty_like(x), torch.empty_like(x, dtype=torch.float16), torch.empty_like(x)
    mix[(1,)](x, y, out, halves, integers, 512)
    assert torch.equal(out, torch.where(x > y, x + y, x * y))
    assert torch.equal(halves, x.half())
    assert torch.equal(integers, x.int().bfloat16())


@triton.jit
def copy(x, y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_to_the_nearest_even(dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:7] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1.00390625, 1.01171875, 1e-40])
    x[7] = 3.4e38  # rounds to infinity
    y = torch.empty(4096, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, of the overflow
        copy[(1,)](x, y, 4096)
    expected = x.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0).view(torch.int16), expected.nan_to_num(7.0).view(torch.int16))


def test_another_interpreter_than_the_known_one_is_refused(monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_dot")
    with pytest.raises(RuntimeError, match="missing: create_dot"):
        repair.__wrapped__()
    monkeypatch.delattr(interpreter, "TensorHandle")
    with pytest.raises(RuntimeError, match="create_dot, TensorHandle"):
        repair.__wrapped__()


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_a_cpu_tensor_reaches_the_cuda_implementation():
    def on_the_cpu(x):
        raise AssertionError("the CPU's implementation was called")

    operation = register(
        "interpreted_sample(Tensor x) -> Tensor",
        cpu=on_the_cpu,
        cuda=f"{__name__}:double",
        fake=torch.empty_like,
    )
    assert torch.equal(operation(torch.ones(3)), torch.full((3,), 2.0))


def test_nothing_compiles_here():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        compile_for(norm(1024, 4), "sm_90")
