"""kernels/activation: formulas against float64 autograd, special values, layouts, errors, and real SIMD."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import activation, streaming
from kernels.activation import cpu_elementwise, cpu_softmax, cpu_swiglu
from kernels.activation.formulas import FAMILY, translate
from kernels.inspect import assembly_of, inspect_function
from kernels.op import FallbackWarning
from kernels.simd import exp_nonpositive_float32, full_width, host_features
from kernels.threads import chunked

PARAMETERS = {"leaky_relu": (0.1,), "softplus": (2.0, 3.0), "elu": (1.3,)}
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

pytestmark = pytest.mark.usefixtures("every_size")


def public(name):
    if name == "gelu_tanh":
        return lambda x: kernels.gelu(x, approximate="tanh")
    return lambda x: getattr(kernels, name)(x, *PARAMETERS.get(name, ()))


def of_torch(name):
    return lambda x: TORCH.get(name, getattr(F, name, None))(x, *PARAMETERS.get(name, ()))


@pytest.mark.parametrize("name", FAMILY)
def test_gradient_is_the_derivative_of_the_value(name):
    """The very formulas that the kernels compile, in float64."""
    member, parameters = FAMILY[name], PARAMETERS.get(name, ())
    names = {"exp_nonpositive": lambda x: torch.exp(x.clamp(max=0)), "where": torch.where, "abs": abs}
    formulas = translate(names, lambda formula: formula)
    value, gradient = formulas[member.value.__name__], formulas[member.gradient.__name__]

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = value(x, *parameters)
            ctx.save_for_backward(out if member.keeps_output else x)
            return out

        @staticmethod
        def backward(ctx, grad):
            return gradient(grad, ctx.saved_tensors[0], *parameters)

    x = torch.linspace(-5, 5, 42, dtype=torch.float64, requires_grad=True)  # not 0, where some have a corner
    assert torch.autograd.gradcheck(Pair.apply, (x,), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(value(x, *parameters), of_torch(name)(x), atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_nan_and_infinity_come_out_as_from_torch(name):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 200.0, -200.0, 1e-30]).repeat(16)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = public(name)(ours), of_torch(name)(theirs)
    if name == "gelu":  # torch's vectorised erf makes NaN of the infinite; the limit is the input
        want = torch.where(x == math.inf, x, want)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in ((got, ours), (want, theirs))),
        equal_nan=True,
    )


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [-math.inf, -math.inf]])
def test_softmax_of_nan_and_infinity(row):
    x = torch.tensor([row * 20, [1.0, 2.0] * 20])
    torch.testing.assert_close(kernels.softmax(x, -1), F.softmax(x, -1), equal_nan=True)


def test_memory_layout_is_kept_as_torch_keeps_it():
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    for given in (x, x.transpose(1, 3), x[:, :, ::2], x.expand(2, 3, 5, 7)[:1].expand(4, 3, 5, 7)):
        assert kernels.silu(given).stride() == F.silu(given).stride()
        torch.testing.assert_close(kernels.silu(given), F.silu(given))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernels.silu(leaf), leaf, torch.ones(2, 3, 5, 7))  # another layout than x
    torch.testing.assert_close(grad, torch.autograd.grad(F.silu(leaf).sum(), leaf)[0])
    assert kernels.silu(torch.tensor(0.5)).shape == ()


def test_halves_of_a_projection_are_read_where_they_lie(monkeypatch):
    gate, up = torch.randn(3, 5, 34).chunk(2, -1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("a copy"))
    torch.testing.assert_close(cpu_swiglu.swiglu(gate, up), F.silu(gate) * up)


def test_swiglu_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"one shape and dtype.*\(2, 3\).*\(2, 4\)"):
        kernels.swiglu(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="float16"):
        kernels.swiglu(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16))


def test_errors_are_torchs():
    with pytest.raises(RuntimeError, match="none or tanh"):
        kernels.gelu(torch.ones(3), approximate="erf")
    for function in (kernels.relu, kernels.tanh, kernels.elu):
        with pytest.raises(TypeError):
            function([1.0])
    with pytest.raises(IndexError, match="dim=2"):
        kernels.softmax(torch.ones(2, 3), 2)


def test_what_the_kernels_do_not_take_runs_in_torch_and_says_so(monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())
    x = torch.tensor([-1.0, 2.0])
    with pytest.warns(FallbackWarning, match="inplace"):
        assert kernels.relu(x, inplace=True) is x
    assert x.tolist() == [0.0, 2.0]
    with pytest.warns(FallbackWarning, match="not float64"):
        assert kernels.tanh(x.double()).dtype == torch.float64


def test_each_form_of_gelu_is_left_to_torch_below_a_size_of_its_own(monkeypatch):
    called = []
    for name in ("gelu", "gelu_tanh"):
        monkeypatch.setitem(activation.CALLS, name, lambda x, name=name: called.append(name))
    sizes = {"gelu": 10, "gelu_tanh": 5}
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: sizes[name])
    for count in (4, 5, 9, 10):
        kernels.gelu(torch.ones(count))
        kernels.gelu(torch.ones(count), approximate="tanh")
    assert called == ["gelu_tanh"] * 2 + ["gelu", "gelu_tanh"]


def test_exponential_is_within_its_bounds():
    @chunked
    def over(chunk, x, out):
        full_width()
        for i in range(x.size):
            out[i] = exp_nonpositive_float32(x[i])

    random = np.random.default_rng(3)
    for low, high, bound in ((-20, 0, 1.6), (-86.9, -20, 5), (0, 88, 5)):
        x = random.uniform(low, high, 200_000).astype(np.float32)
        out = np.empty_like(x)
        over(1, torch.from_numpy(x), torch.from_numpy(out))
        exact = np.exp(x.astype(np.float64))
        assert (np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max() < bound
    odd = np.array([0x7FFFFFFF, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)  # NaN of any payload
    x = np.concatenate([odd, np.array([0.0, -0.0, -np.inf, -87.1, -1e30], np.float32)])
    out = np.empty_like(x)
    over(1, torch.from_numpy(x), torch.from_numpy(out))
    np.testing.assert_array_equal(out, np.array([*[np.nan] * 3, 1, 1, 0, 0, 0], np.float32))


@pytest.mark.skipif("avx512f" not in host_features(), reason="512-bit registers are AVX-512's")
def test_loops_are_packed_at_512_bits_without_gathers_or_libm():
    x = torch.rand(64)
    for name in FAMILY:
        cpu_elementwise.forward(name)(x, *PARAMETERS.get(name, ()))
    cpu_softmax.softmax(x[None])
    for body in (*map(cpu_elementwise.forward_body, FAMILY.values()), cpu_softmax._forward):
        types = body.signatures[0]
        code = inspect_function(body.compiled, types)
        assert code.verdict == "packed, 512 bit", code.summary
        assert not code.libm
        assert code.float64 == 0
        assert "gather" not in assembly_of(body.compiled, types)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 1056), (3, 32), (1, 40_032)])
def test_what_is_streamed_past_the_caches_is_the_same(shape, dtype, monkeypatch):
    x, up = torch.randn(2, *shape, dtype=torch.float32).to(dtype).unbind()
    half = torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, : shape[1]]  # rows with a stride
    works = [
        lambda: cpu_softmax.softmax(x),
        lambda: cpu_swiglu.swiglu(x, up),
        lambda: cpu_swiglu.swiglu(half, up),
        lambda: torch.stack(cpu_swiglu.swiglu_backward(x, half, up)),
        lambda: cpu_swiglu.swiglu_backward_gate(up, x, half),
        lambda: cpu_elementwise.forward("silu")(x),
        lambda: cpu_elementwise.backward("silu")(x, up),
    ]
    expected = [work() for work in works]
    seen = []
    for module in (cpu_softmax, cpu_swiglu, cpu_elementwise):
        monkeypatch.setattr(
            module, "is_streamed", lambda *args: seen.append(streaming.is_streamed(*args)) or seen[-1]
        )
    monkeypatch.setattr(streaming, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streaming, "is_fresh", lambda out: False)
    softmax, *others = (work() for work in works)
    # The compiler sums a row in another order where it made two loops of one: a last bit may differ.
    torch.testing.assert_close(softmax, expected[0], rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert all(map(torch.equal, others, expected[1:]))
    assert seen == [True] * (len(works) + 1)  # swiglu's backward asks for both of its outputs


def test_a_streamed_row_need_not_be_whole_vectors(monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streaming, "is_fresh", lambda out: False)
    gate, up = torch.randn(2, 40_007).unbind()
    torch.testing.assert_close(cpu_swiglu.swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(cpu_elementwise.forward("silu")(gate), F.silu(gate))
