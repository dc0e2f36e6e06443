"""kernels/op.py: when torch's own operation runs instead, and what is said then."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import op
from kernels.op import FallbackWarning


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(op, "_warned", set())


def test_what_the_kernels_do_not_take_runs_torchs_own_and_is_said_once(nothing_said, every_size):
    x = torch.randn(100, 100, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match=r"kernels\.softmax: .* not float64; torch's own operation runs"):
        out = kernels.softmax(x, -1)
    assert torch.equal(out, torch.softmax(x, -1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.softmax(x, -1)


def test_who_calls_from_no_module_is_told_too(nothing_said):
    with pytest.warns(FallbackWarning, match="inplace=True has no fused form"):
        exec("kernels.relu(x, inplace=True)", {"kernels": kernels, "x": torch.randn(3)})


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_rms_norm", "softmax", "gelu", "cross_entropy", "linear_int8", "linear_int4"]
)
def test_the_default_dtype_is_for_what_the_user_makes(every_size, name):
    x, weight, target = torch.randn(8, 128), torch.rand(128), torch.randint(128, (8,))
    integers, halves = (
        kernels.quantize_int8(torch.randn(64, 128)),
        kernels.quantize_int4(torch.randn(64, 128)),
    )
    calls = {
        "layer_norm": lambda: kernels.layer_norm(x, (128,)),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, x, (128,), weight)[0],
        "softmax": lambda: kernels.softmax(x, -1),
        "gelu": lambda: kernels.gelu(x),
        "cross_entropy": lambda: kernels.cross_entropy(x, target),
        "linear_int8": lambda: kernels.linear_int8(x, *integers),
        "linear_int4": lambda: kernels.linear_int4(x, *halves),
    }
    x.requires_grad_()

    def step():
        out = calls[name]()
        (grad,) = torch.autograd.grad(out.sum(), x)
        return out, grad

    expected = step()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, step(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_device_runs_torchs_own(nothing_said):
    with pytest.warns(FallbackWarning, match="no kernels for device 'meta'"):
        out = kernels.softmax(torch.empty(10, 10, device="meta"), -1)
    assert out.device.type == "meta"


@pytest.mark.parametrize("why", ["capability 8.0 and above, not 7.5", "triton, which is not installed"])
def test_a_gpu_that_the_kernels_do_not_take_runs_torchs_own(monkeypatch, nothing_said, why):
    """A tensor of a CUDA device without data, which torch has also where there is no such device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if "triton" in why:
        monkeypatch.setattr(op.importlib.util, "find_spec", lambda name: None)
    op._gpu_lacks.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.empty(1000, 1000, device="cuda")
            with pytest.warns(FallbackWarning, match=why):
                out = kernels.softmax(x, -1)
        assert out.device.type == "cuda"
        monkeypatch.setattr("kernels.optimizer.device_of", lambda tensor: torch.device("cuda"))
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        with pytest.warns(FallbackWarning, match=rf"kernels\.SGD: .*{why}"):
            kernels.SGD([parameter], lr=0.1).step()
    finally:
        op._gpu_lacks.cache_clear()


@pytest.mark.parametrize(("capability", "ours"), [((7, 5), False), ((9, 0), True)])
def test_a_graph_for_a_gpu_has_the_kernels_that_it_can_run(monkeypatch, capability, ours):
    """In one graph, though what the GPU is cannot be traced."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    op._gpu_lacks.cache_clear()
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    try:
        with FakeTensorMode():
            x = torch.empty(1000, 1000, device="cuda")
            torch.compile(lambda x: kernels.softmax(x, -1), fullgraph=True, backend=backend)(x)
    finally:
        op._gpu_lacks.cache_clear()
        torch._dynamo.reset()
    assert ("perflab.softmax.default" in targets) == ours


def test_small_tensors_run_torchs_own_and_nothing_is_said(monkeypatch, nothing_said):
    calls = []
    monkeypatch.setattr("kernels.activation._softmax", lambda x: calls.append(x) or x)
    monkeypatch.setattr(op, "_crossover", lambda: {"cpu": {"softmax": 512}})
    op.crossover.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.softmax(torch.randn(511), -1)
            assert not calls
            kernels.softmax(torch.randn(512), -1)
            assert len(calls) == 1
    finally:
        op.crossover.cache_clear()


def test_importing_kernels_loads_nothing_heavy():
    code = (
        "import sys, kernels; dir(kernels)\n"
        "print([name for name in ('torch', 'numba', 'triton') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_using_the_cpu_kernels_loads_no_triton_and_leaves_numbas_settings():
    code = (
        "import numba, sys; before = dict(vars(numba.config))\n"
        "import torch, kernels\n"
        "kernels.softmax(torch.randn(1000, 1000), -1)\n"
        "names = [n for n in ('CPU_NAME', 'CPU_FEATURES', 'THREADING_LAYER', 'NUM_THREADS', 'OPT')\n"
        "         if hasattr(numba.config, n)]\n"
        "print(all(before.get(n) == getattr(numba.config, n) for n in names) and len(names) > 2,\n"
        "      'triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True False", done.stdout + done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sofmax'"):
        kernels.sofmax  # noqa: B018


def test_ours_in_the_place_of_torchs_do_not_call_themselves(monkeypatch):
    """As a user gives a model our kernels; the tensors are small enough to be left to torch."""
    x, weight, target = torch.randn(8, 64), torch.randn(64, 64), torch.randint(64, (8,))
    heads = x.view(1, 8, 8, 8)
    calls = {
        "layer_norm": (x, (64,)),
        "rms_norm": (x, (64,)),
        "softmax": (x, -1),
        "cross_entropy": (x, target),
        "scaled_dot_product_attention": (heads, heads, heads),
        **dict.fromkeys(("gelu", "silu", "sigmoid", "tanh", "relu", "leaky_relu", "softplus", "elu"), (x,)),
    }
    if hasattr(F, "linear_cross_entropy"):
        calls["linear_cross_entropy"] = (x, weight, target)
    expected = {name: getattr(F, name)(*arguments) for name, arguments in calls.items()}
    for name in calls:
        ours = getattr(kernels, name)
        monkeypatch.setattr(F, name, ours)
        if name in ("sigmoid", "tanh"):
            monkeypatch.setattr(torch, name, ours)
    for name, arguments in calls.items():
        assert torch.equal(getattr(F, name)(*arguments), expected[name]), name
