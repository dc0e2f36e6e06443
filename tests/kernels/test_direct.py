"""kernels/direct.py: which calls pass torch's dispatcher, and that those that do not are the same."""

import subprocess
import sys

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import direct, normalization
from kernels.direct import directly

ROWS, COLUMNS = 5, 48


@pytest.fixture
def x():
    return torch.randn(ROWS, COLUMNS)


class _Watched:
    """An operation y = 2 x with its gradient, which says which way a call went."""

    def __init__(self, name):
        self.ways = []
        qualified = f"perflab_test::{name}"
        torch.library.define(qualified, "(Tensor input, float factor) -> Tensor")
        torch.library.impl(qualified, "cpu", lambda input, factor: self._run("dispatched", input, factor))
        torch.library.register_fake(qualified, lambda input, factor: torch.empty_like(input))
        torch.library.register_autograd(qualified, self._backward, setup_context=self._keep)
        overload = getattr(torch.ops.perflab_test, name).default
        run = {"cpu": lambda input, factor: self._run("direct", input, factor)}
        self.call = directly(overload, run, self._keep, self._backward)

    def _run(self, way, input, factor):
        self.ways.append(way)
        return torch.from_numpy(input.detach().numpy() * factor)

    @staticmethod
    def _keep(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def _backward(ctx, grad):
        return grad * ctx.factor, None

    def way(self, *arguments):
        """Of one call; its result."""
        self.ways.clear()
        result = self.call(*arguments)
        (way,) = self.ways
        return way, result


@pytest.fixture(scope="module")
def watched():
    return _Watched("twice")


class _SomethingElse(torch.Tensor):
    """A tensor of another class, whose results are of it too."""


class _Listener(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_plain_call_goes_to_the_implementation(watched, x):
    way, result = watched.way(x, 2.0)
    assert way == "direct"
    assert torch.equal(result, 2 * x)
    assert not result.requires_grad


def test_a_plain_call_is_differentiable(watched, x):
    way, result = watched.way(x.requires_grad_(), 3.0)
    assert way == "direct"
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3.0))


def test_parameters_views_and_inference_are_plain(watched, x):
    assert watched.way(torch.nn.Parameter(x), 2.0)[0] == "direct"
    assert watched.way(x[1:, ::2], 2.0)[0] == "direct"
    with torch.no_grad():
        way, result = watched.way(x.requires_grad_(), 2.0)
        assert way == "direct"
        assert not result.requires_grad
    with torch.inference_mode():
        assert watched.way(torch.ones(3), 2.0)[0] == "direct"
        assert watched.way(x, 2.0)[0] == "direct"
    with torch.autocast("cpu", torch.bfloat16):
        assert watched.way(x, 2.0)[0] == "direct"


@pytest.mark.parametrize(
    "watch",
    [
        _Nothing,
        _Listener,
        lambda: torch.device("meta"),  # what an implementation makes must not come to lie there
        lambda: FlopCounterMode(display=False),
        torch.profiler.profile,
        lambda: torch.profiler.profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)),
        torch.autograd.profiler.profile,
    ],
    ids=["a mode", "functions", "a device", "FLOPs", "profiler", "of all threads", "old profiler"],
)
def test_whoever_watches_sees_the_operation(watched, x, watch):
    with watch() as listener:
        assert watched.way(x.requires_grad_(), 2.0)[0] == "dispatched"
    assert not isinstance(listener, _Listener) or "perflab_test.twice.default" in listener.heard
    assert watched.way(x, 2.0)[0] == "direct"


def test_below_autograd_nothing_is_recorded(watched, x):
    with torch._C._AutoDispatchBelowAutograd():
        assert not watched.call(x.requires_grad_(), 2.0).requires_grad


@pytest.mark.parametrize(
    "first",
    ["with Mode(): kernels.softplus(x)", "make_fx(lambda v: kernels.softplus(v))(x)"],
)
def test_a_first_use_that_is_watched_settles_nothing(first):
    """What a thread's keys are while nobody watches is not asked of one that is watched."""
    code = f"""
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
import kernels
seen = []
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {{}}))
x = torch.randn(1024, 1024)  # ours, not left to torch
{first}
seen.clear()
with Mode(): kernels.softplus(x)
assert "perflab.softplus.default" in seen, seen
assert "perflab.softplus" in make_fx(lambda v: kernels.softplus(v))(x).code
from kernels import direct
assert direct._device_of((x,), [frozenset([torch.Tensor])]) == "cpu"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_other_classes_keep_theirs(watched, x):
    way, result = watched.way(x.as_subclass(_SomethingElse), 2.0)
    assert way == "dispatched"
    assert type(result) is _SomethingElse


def test_a_negated_view_is_what_it_says(watched):
    x = torch.complex(torch.ones(4), torch.arange(4.0)).conj().imag
    assert x.is_neg()
    way, result = watched.way(x, 2.0)
    assert way == "dispatched"
    assert torch.equal(result, -2 * torch.arange(4.0))


def test_what_must_be_converted_or_is_wrong_is_the_dispatchers(watched, x):
    way, result = watched.way(x, 2)  # an int for a float
    assert way == "dispatched"
    assert torch.equal(result, 2 * x)
    assert torch.equal(watched.call(factor=2.0, input=x), 2 * x)
    with pytest.raises((TypeError, RuntimeError), match="factor"):
        watched.call(x)
    with pytest.raises((TypeError, RuntimeError), match="str"):
        watched.call(x, "2")


def test_transforms_and_traces_have_the_operation(watched, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda x: watched.call(x, 2.0))(x)
    assert "perflab_test.twice" in traced.code
    traced = torch.jit.trace(lambda x: watched.call(x, 2.0), x)
    assert "perflab_test::twice" in str(traced.graph)
    watched.ways.clear()
    assert torch.equal(torch.vmap(lambda row: watched.call(row, 2.0))(x), 2 * x)
    assert set(watched.ways) == {"dispatched"}


def test_an_operation_without_a_gradient_says_so_as_before(x):
    y = x.relu().requires_grad_()
    out = normalization._norm_backward_input(y, None, x, torch.zeros(ROWS), torch.ones(ROWS), None, COLUMNS)
    with pytest.warns(UserWarning, match="norm_backward_input: an autograd kernel was not registered"):
        out.sum().backward()


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
def test_gradients_are_the_dispatchers(every_size, x, needs):
    """Those that are asked for, and only they."""
    weight, bias = torch.rand(COLUMNS), torch.rand(COLUMNS)
    given = [
        value.clone().requires_grad_(wanted) for value, wanted in zip((x, weight, bias), needs, strict=True)
    ]
    incoming = torch.randn(ROWS, COLUMNS)
    results = []
    for mode in (_Nothing, None):
        for value in given:
            value.grad = None
        if mode is None:
            out = kernels.layer_norm(given[0], (COLUMNS,), *given[1:])
        else:
            with mode():
                out = kernels.layer_norm(given[0], (COLUMNS,), *given[1:])
        out.backward(incoming)
        results.append([out.detach(), *(value.grad for value in given)])
    for dispatched, straight in zip(*results, strict=True):
        assert (dispatched is None) == (straight is None)
        assert dispatched is None or torch.equal(dispatched, straight)


def test_no_operation_of_ours_is_dispatched_in_a_plain_step(every_size, monkeypatch, x):
    """Numbers are handed over as the schemas have them, also those that torch lets be whole."""
    seen = []
    device_of = direct._device_of
    monkeypatch.setattr(direct, "_device_of", lambda *args: seen.append(device_of(*args)) or seen[-1])
    heads = torch.randn(1, 2, 40, 16, requires_grad=True)
    steps = {
        "softplus": lambda: kernels.softplus(x, beta=1, threshold=20),
        "elu": lambda: kernels.elu(x, 1),
        "leaky_relu": lambda: kernels.leaky_relu(x, 0),
        "softmax": lambda: kernels.softmax(x, -1),
        "swiglu": lambda: kernels.swiglu(x, x),
        "rms_norm": lambda: kernels.rms_norm(x, (COLUMNS,)),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, x, (COLUMNS,))[0],
        "rotary": lambda: kernels.rotary_embedding(x, torch.ones(ROWS, 24), torch.ones(ROWS, 24)),
        "attention": lambda: kernels.scaled_dot_product_attention(heads, heads, heads, dropout_p=0, scale=1),
        "cross_entropy": lambda: kernels.cross_entropy(x, torch.arange(ROWS), label_smoothing=0),
    }
    x.requires_grad_()
    for name, step in steps.items():
        seen.clear()
        step().sum().backward()
        assert seen, name
        assert set(seen) == {"cpu"}, name
