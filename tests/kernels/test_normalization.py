"""Normalisation: what the rules for every operation do not cover (tests/kernels/test_operations.py)."""

import pytest
import torch
import torch.nn.functional as F
from precision import assert_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.interpreter import interpreting
from kernels.op import FallbackWarning
from kernels.simd import vector_bits

on_cpu = pytest.mark.skipif(interpreting(), reason="of the CPU's kernels")

pytestmark = pytest.mark.usefixtures("every_size")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- errors and corners --------------------------------------------------------------------------

x, ones = torch.ones(4, 8), torch.ones(8)
REFUSED = {
    "another length": (x, (7,)),
    "another order": (x, (8, 4)),
    "no dimensions": (x, ()),
    "more dimensions": (x, (2, 4, 8)),
    "a number": (x, 8),
    "a weight too long": (x, (8,), torch.ones(9)),
    "a weight of one": (x, (8,), torch.ones(1)),
    "no tensor": ([1.0], (1,)),
    "a list as weight": (x, (8,), [1.0] * 8),
    "integers": (x.int(), (8,)),
}


@pytest.mark.filterwarnings("ignore::kernels.op.FallbackWarning")
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_in_torchs_words(name, case):
    with pytest.raises(Exception) as theirs:
        getattr(F, name)(*REFUSED[case])
    with pytest.raises(theirs.type) as ours:
        getattr(kernels, name)(*REFUSED[case])
    assert str(ours.value) == str(theirs.value)


def test_a_bias_or_weight_of_another_16_bit_type_is_refused():
    for weight, bias in ((ones.half(), None), (ones, ones.bfloat16()), (ones.bfloat16(), ones)):
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            kernels.layer_norm(x.bfloat16(), (8,), weight, bias)


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_a_residual_of_another_shape_is_refused(name):
    add = getattr(kernels, name)
    with pytest.raises(
        ValueError, match=r"input has shape \(4, 8\) and residual \(8,\); they must be the same"
    ):
        add(x, ones, (8,))
    with pytest.raises(TypeError, match="residual must be a Tensor, not NoneType"):
        add(x, None, (8,))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        add(x, x, (7,))


def test_nothing_to_normalise_gives_nothing():
    weight = ones.clone().requires_grad_()
    out = kernels.layer_norm(torch.empty(0, 8), (8,), weight, ones)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert kernels.rms_norm(torch.empty(3, 0), (0,)).shape == (3, 0)


def test_float64_runs_torchs_own_with_a_warning(monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())
    values = random(3, 8).double()
    with pytest.warns(FallbackWarning, match="not float64"):
        got = kernels.add_rms_norm(values, values, (8,))[0]
    assert torch.equal(got, F.rms_norm(values + values, (8,)))


def test_a_row_with_infinity_or_nan_spoils_no_other():
    values = random(4, 100)
    values[1, 3], values[2, 70] = torch.inf, torch.nan
    for name in ("layer_norm", "rms_norm"):
        got, expected = getattr(kernels, name)(values, (100,)), getattr(F, name)(values, (100,))
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got, expected, equal_nan=True)


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("data", ["large mean", "large start", "one large element"])
def test_statistics_hold_whatever_the_rows_look_like(data):
    values = random(24, 1000)
    if data == "large mean":
        values += 3000
    elif data == "large start":  # the shift, the mean of the first elements, is far from the mean
        values[:, :32] += 1e4
    else:
        values[:, 5] = 1e5
    ours, theirs = kernels.layer_norm(values, (1000,)), F.layer_norm(values, (1000,))
    exact = F.layer_norm(values.double(), (1000,))
    assert_accurate(ours, theirs, exact, data)
    rest = slice(32, None)  # beside the large elements the others are small: their errors count too
    assert_accurate(ours[:, rest], theirs[:, rest], exact[:, rest], f"{data}, the rest")


def test_statistics_of_16_bit_rows_are_kept_in_float32():
    values = (random(8, 256) + 10).bfloat16()
    _, mean, rstd = torch.ops.perflab.layer_norm(values, None, None, 256, 1e-5)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), values.double().mean(1), rtol=1e-6, atol=0)
    exact = (values.double().var(1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


# --- gradients -----------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of our operations in the order of their calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "perflab":
            self.names.append(func.name().removeprefix("perflab::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needed", "call"),
    [
        ({"input"}, "norm_backward_input"),
        ({"residual"}, "norm_backward_input"),
        ({"weight"}, "norm_backward_weight"),
        ({"bias"}, "norm_backward_weight"),
        ({"input", "weight"}, "norm_backward"),
        ({"residual", "bias"}, "norm_backward"),
    ],
)
def test_only_the_gradients_that_are_needed_are_computed_once(needed, call):
    values = {
        "input": random(6, 32),
        "residual": random(6, 32, seed=1),
        "weight": random(32, seed=2),
        "bias": random(32, seed=3),
    }
    for name in needed:
        values[name].requires_grad_()
    out, _ = kernels.add_layer_norm(normalized_shape=(32,), **values)
    with Calls() as calls:
        out.sum().backward()
    assert calls.names == [call]
    assert {name for name, value in values.items() if value.grad is not None} == needed


def test_either_output_alone_has_its_gradient():
    values, residual, weight = (random(6, 32, seed=seed).requires_grad_() for seed in range(3))
    weight = random(32).requires_grad_()
    for index in (0, 1):
        got = kernels.add_rms_norm(values, residual, (32,), weight)[index]
        total = values + residual
        expected = (F.rms_norm(total, (32,), weight), total)[index]
        inputs = (values, residual, weight)[: 3 - index]
        for left, right in zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(left, right)


def test_each_gradient_has_the_dtype_of_its_tensor():
    values, residual = random(6, 32, dtype=torch.bfloat16).requires_grad_(), random(6, 32).requires_grad_()
    weight, bias = random(32).requires_grad_(), random(32).requires_grad_()
    assert kernels.layer_norm(values, (32,), weight, bias).dtype == torch.bfloat16
    out, total = kernels.add_layer_norm(values, residual, (32,), weight, bias)
    assert out.dtype == total.dtype == torch.float32  # as input + residual
    (out.sum() + total.sum()).backward()
    assert values.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == residual.grad.dtype == torch.float32


# --- the CPU's kernels ---------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_rows_in_either_direction_are_the_same(dtype, monkeypatch):
    from kernels.normalization import cpu, cpu_backward

    values, residual, grad = (random(5, 64, dtype=dtype, seed=seed) for seed in range(3))
    weight = random(64, dtype=dtype)

    def run():
        out, total, mean, rstd = cpu.forward(values, residual, weight, weight, 64, 1e-5, True)
        saved = (grad, grad, total, mean, rstd, weight, 64)
        return out, total, *cpu_backward.backward(*saved, inputs=True, weighted=True, biased=True)

    expected = run()
    seen, placed = [], []
    beside = cpu.empty_beside
    monkeypatch.setattr(cpu, "empty_beside", lambda *args, **of: placed.append(args) or beside(*args, **of))
    for module in (cpu, cpu_backward):
        is_streamed = module.is_streamed
        monkeypatch.setattr(
            module, "is_streamed", lambda *args, of=is_streamed: seen.append(of(*args)) or seen[-1]
        )
    monkeypatch.setattr("kernels.streaming.STREAMED_BYTES", 0)
    monkeypatch.setattr("kernels.streaming.is_fresh", lambda out: False)
    for descending in (True, False):
        for module in (cpu, cpu_backward):
            monkeypatch.setattr(module, "is_descending", lambda *args, to=descending: to)
        assert all(map(torch.equal, run(), expected))
    assert seen
    assert all(seen)
    assert len(placed) == 2 * 3  # of two directions: weight and bias forward, weight backward
    assert not is_streamed(torch.empty(5, 61), 61)  # rows that are no whole cache lines


@on_cpu
def test_rows_are_stored_from_the_side_away_from_the_inputs():
    from kernels.normalization.cpu import is_descending

    memory = torch.empty(4096)
    low, high = memory[0:1024], memory[1040:2064]
    assert is_descending(high, low)
    assert not is_descending(low, high)
    assert not is_descending(low, low)


@on_cpu
@pytest.mark.skipif(vector_bits() < 512, reason="needs AVX-512")
def test_loops_fill_512_bit_registers_and_call_nothing():
    from kernels.inspect import inspect_function
    from kernels.normalization import cpu, cpu_backward

    cpu.forward(x, None, ones, ones, 8, 1e-5, True)
    cpu_backward.backward(x, None, x, torch.zeros(4), torch.ones(4), ones, 8, True, True, True)
    for body in (cpu.forward_rows, cpu_backward.backward_rows):
        signature = next(s for s in body.signatures if s[2].dtype.name == "float32")
        found = inspect_function(body.compiled, signature)
        sums = [loop for loop in found.loops if loop.packed >= 8]  # unrolled by LLVM's vectoriser
        assert sums, body.__name__
        assert all(loop.packed_bits == 512 for loop in sums), body.__name__
        assert not found.libm
        assert found.float64 == 0


# --- Triton's kernels ----------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.skipif(not interpreting(), reason="in the interpreter")
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_rows_too_long_for_registers_give_the_same(name, monkeypatch):
    from kernels.normalization import gpu, gpu_backward

    values = {"input": random(5, 300) + 10, "weight": random(300, seed=1)}
    if name.startswith("add"):
        values["residual"] = random(5, 300, seed=2)
    gradients = []
    for held in (4096, 64):
        for module, split in ((gpu, 128), (gpu_backward, 64)):
            monkeypatch.setattr(module, "HELD", held)
            monkeypatch.setattr(module, "SPLIT", split)
        inputs = {key: value.clone().requires_grad_() for key, value in values.items()}
        outputs = getattr(kernels, name)(normalized_shape=(300,), **inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [random(5, 300, seed=3 + index) for index in range(len(outputs))]
        gradients.append((*outputs, *torch.autograd.grad(outputs, list(inputs.values()), weights)))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
