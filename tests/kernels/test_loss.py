"""kernels/loss: torch's semantics and errors, special values, what is kept, memory, the loops' assembly."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from numba import types
from precision import assert_accurate

import kernels
from kernels import loss, simd
from kernels.inspect import assembly_of, inspect_function
from kernels.loss import cpu, passes, reference


@pytest.fixture(autouse=True)
def kernels_alone(every_size, monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())


def data(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)
    target = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits.to(dtype), target


def gradient(function, logits, *args, grad=None, **options):
    logits = logits.detach().clone().requires_grad_()
    value = function(logits, *args, **options)
    return value.detach(), torch.autograd.grad(value, logits, grad)[0]


# --- semantics and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "target", "options"),
    [
        ((4, 5), torch.tensor([0, 1, 5, 2]), {}),
        ((4, 5), torch.tensor([0, -1, 3, 2]), {"label_smoothing": 0.1}),
        ((4, 5), torch.tensor([0, -100, 3, 2]), {"ignore_index": 2}),
        ((4, 5), torch.zeros(3, dtype=torch.int64), {}),
        ((4, 5), torch.zeros(4, 1, dtype=torch.int64), {}),
        ((4, 5), torch.zeros(4, dtype=torch.int32), {}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"label_smoothing": 2.0}),
        ((4, 5), torch.zeros(4, dtype=torch.int64), {"reduction": "average"}),
        ((4, 0), torch.zeros(4, dtype=torch.int64), {}),
        ((), torch.zeros((), dtype=torch.int64), {}),
    ],
)
def test_errors_are_torchs(shape, target, options):
    logits = torch.randn(shape)
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(logits, target, **options)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value).split(".")[0])):
        kernels.cross_entropy(logits, target, **options)
    with pytest.raises(theirs.type):
        kernels.cross_entropy(logits.requires_grad_(), target, **options)
    if len(shape) == 2 and 0 not in shape:
        with pytest.raises(theirs.type):
            kernels.linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), target, **options)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"reduction": "none"}]
)
@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_target_that_counts(rows, options):
    logits, target = torch.randn(rows, 6), torch.full((rows,), -100)
    grad = torch.ones(rows) if options.get("reduction") == "none" else None
    got, want = (
        gradient(function, logits, target, grad=grad, **options)
        for function in (kernels.cross_entropy, F.cross_entropy)
    )
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(got, want, strict=True))
    weight = torch.randn(6, 4)
    got = kernels.linear_cross_entropy(torch.randn(rows, 4), weight, target, **options)
    assert torch.equal(got.nan_to_num(7.0), want[0].nan_to_num(7.0))


def test_shapes_are_torchs():
    for shape, target_shape in [((7,), ()), ((3, 7), (3,)), ((2, 7, 5), (2, 5)), ((2, 7, 5, 4), (2, 5, 4))]:
        target = torch.randint(0, 7, target_shape)
        logits = (
            torch.randn(*shape[:1], *shape[2:], 7).movedim(-1, 1) if len(shape) > 2 else torch.randn(shape)
        )
        for reduction in ("none", "mean"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", kernels.FallbackWarning)
                got = kernels.cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(got, F.cross_entropy(logits, target, reduction=reduction))
    logits, target = data(3, 7)
    for legacy in ({"reduce": False}, {"size_average": False}):
        with pytest.warns(UserWarning, match="deprecated"):
            got = kernels.cross_entropy(logits, target, **legacy)
        with pytest.warns(UserWarning, match="deprecated"):
            torch.testing.assert_close(got, F.cross_entropy(logits, target, **legacy))
    hidden, weight = torch.randn(4), torch.randn(7, 4)
    got = kernels.linear_cross_entropy(hidden, weight, target[0])
    torch.testing.assert_close(got, F.cross_entropy(hidden @ weight.T, target[0]))


def test_what_the_kernels_do_not_take_is_torchs_and_is_said_once():
    logits, target = data(3, 7)
    for args, options, words in [
        ((logits, target), {"weight": torch.rand(7)}, "class weights"),
        ((logits, logits.softmax(-1)), {}, "probabilities"),
        ((torch.randn(3, 7, 2), torch.zeros(3, 2, dtype=torch.int64)), {}, "next to each other"),
        ((logits.double(), target), {}, "float64"),
    ]:
        with pytest.warns(kernels.FallbackWarning, match=words) as caught:
            got = [kernels.cross_entropy(*args, **options), kernels.cross_entropy(*args, **options)]
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert all(torch.equal(value, F.cross_entropy(*args, **options)) for value in got)
    with pytest.warns(kernels.FallbackWarning, match="class weights"):
        kernels.linear_cross_entropy(torch.randn(3, 4), torch.randn(7, 4), target, weight=torch.rand(7))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_are_torchs(smoothing):
    logits, target = data(7, 20000)
    logits[0, 7] = torch.nan
    logits[1, 19990] = torch.inf
    logits[2] = -torch.inf
    logits[3, :17000] = -torch.inf  # whole blocks that add nothing, the first among them
    logits[4, 16000:] = -torch.inf
    logits[5, 3] = torch.nan  # of a target that is ignored
    target[3], target[4], target[5] = 19000, 19990, -100
    options = {"reduction": "none", "label_smoothing": smoothing}
    got, want = (
        gradient(function, logits, target, grad=torch.ones(7), **options)
        for function in (kernels.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(got[0], want[0], equal_nan=True)
    kept = [0, 1, 2, 3, 4, 6]  # torch gives NaN for the ignored row with a NaN, we give 0
    torch.testing.assert_close(got[1][kept], want[1][kept], equal_nan=True)
    assert (got[1][5] == 0).all()


def test_under_autocast_the_loss_is_float32():
    logits, target = data(5, 40, dtype=torch.bfloat16)
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.cross_entropy(logits, target).dtype is F.cross_entropy(logits, target).dtype
        got = kernels.linear_cross_entropy(hidden, weight, target)
        want = F.cross_entropy(F.linear(hidden, weight), target)
    assert got.dtype is want.dtype is torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert kernels.cross_entropy(logits, target).dtype is torch.bfloat16


# --- rows of every length, stores of every kind --------------------------------------------------


@pytest.mark.interpreted
def test_a_row_longer_than_a_block(device):
    """Blocks of the CPU, and the loop of the GPU; targets at their ends."""
    logits, target = data(2, 33001, seed=1)
    logits += torch.linspace(0, 9, 33001)  # the maximum grows along the row
    target[:] = torch.tensor([16384, 33000])
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(device, dtype)
        options = {"label_smoothing": 0.1}
        ours = gradient(kernels.cross_entropy, given, target.to(device), **options)
        theirs = gradient(F.cross_entropy, given, target.to(device), **options)
        exact = gradient(reference.cross_entropy, given.double(), target.to(device), **options)
        for values in zip(ours, theirs, exact, strict=True):
            assert_accurate(*values, dtype)


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 4096, 16399])
def test_streamed_stores_fill_the_same_elements(columns, monkeypatch):
    logits, target = data(9, columns)
    scale, plain, losses = torch.full((1,), 0.5), torch.empty(9, columns), torch.empty(9)
    cpu.visit(logits, target, -100, 0.1, losses, scale, plain)
    monkeypatch.setattr("kernels.streaming.STREAMED_BYTES", 0)
    for offset in (0, 3):  # elements past a cache line
        memory = torch.full((9 * columns + 40,), torch.nan)
        begin = -memory.data_ptr() // 4 % 16 + offset
        streamed = memory[begin : begin + 9 * columns].view(9, columns)
        cpu.visit(logits, target, -100, 0.1, losses, scale, streamed)
        torch.testing.assert_close(streamed, plain, rtol=1e-6, atol=1e-9)
        assert memory[:begin].isnan().all()
        assert memory[begin + 9 * columns :].isnan().all()


@pytest.mark.skipif(simd.vector_bits() < 512, reason="needs AVX-512")
@pytest.mark.parametrize(
    ("dtype", "element"), [(torch.float32, types.float32), (torch.bfloat16, types.uint16)]
)
def test_the_loops_are_full_width_without_gathers_or_libm(dtype, element):
    kernels.cross_entropy(*data(2, 3, dtype=dtype))
    array, vector = types.Array(element, 2, "C"), types.float32[::1]
    stream = types.int64 if element is types.float32 else types.none
    signature = (types.int64, types.int64, array, types.int64[::1], types.int64, types.float64, vector)
    signature = (*signature, types.int64, vector, array, stream)
    seen = inspect_function(cpu._rows.compiled, signature)
    assert seen.libm in ({}, {"log": 1})  # once a row
    assert (
        sum(loop.packed_bits == 512 for loop in seen.loops) >= 5
    )  # maximum, exponentials (2), sum, gradient
    assert not any(loop.calls for loop in seen.loops if loop.packed)
    assert "vgather" not in assembly_of(cpu._rows.compiled, signature)


# --- what the forward pass keeps -----------------------------------------------------------------


@pytest.mark.interpreted
def test_a_kept_graph_may_be_used_again(device):
    logits, target = (tensor.to(device) for tensor in data(5, 70))
    logits.requires_grad_()
    hidden, weight = torch.randn(5, 8, device=device, requires_grad=True), torch.randn(70, 8, device=device)
    for value, source in (
        (kernels.cross_entropy(logits, target), logits),
        (kernels.linear_cross_entropy(hidden, weight, target), hidden),
    ):
        first = torch.autograd.grad(value, source, retain_graph=True)[0]
        before = first.clone()
        first.zero_()
        three = torch.autograd.grad(value, source, torch.tensor(3.0, device=device), retain_graph=True)[0]
        zero = torch.autograd.grad(3 * value, source, torch.tensor(0.0, device=device), retain_graph=True)[0]
        last = torch.autograd.grad(2 * value, source)[0]
        torch.testing.assert_close(three, 3 * before)
        torch.testing.assert_close(last, 2 * before)
        assert (zero == 0).all()
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, source)


def test_an_incoming_gradient_of_one_moves_nothing(monkeypatch):
    logits, target = data(5, 70)
    logits.requires_grad_()
    monkeypatch.setattr(torch.Tensor, "mul_", lambda *_: pytest.fail("scaled by one"))
    value = kernels.cross_entropy(logits, target)
    (kept,) = value.grad_fn.saved_tensors
    value.backward()
    assert logits.grad.data_ptr() == kept.data_ptr()


def test_a_second_derivative_is_an_error():
    logits, target = data(5, 70)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(70, 8)
    logits.requires_grad_()
    for value, source in (
        (kernels.cross_entropy(logits, target), logits),
        (kernels.cross_entropy(logits, target, reduction="none").sum(), logits),
        (kernels.linear_cross_entropy(hidden, weight, target), hidden),
    ):
        (first,) = torch.autograd.grad(value, source, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()


def test_a_scaled_loss_keeps_small_gradients_in_float16():
    """As torch.amp scales it: most gradients are below float16's range unless scaled before."""
    logits, target = data(4096, 3, dtype=torch.float16)
    logits[:, 0] += 9
    exact = gradient(reference.cross_entropy, logits.double(), target, grad=torch.tensor(65536.0).double())[1]
    ours, hidden = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        (65536 * kernels.cross_entropy(ours, target)).backward()
        (65536 * kernels.linear_cross_entropy(hidden, torch.eye(3), target)).backward()
    assert ((ours.grad - exact).abs() <= 1e-3 * exact.abs() + 16 * 2e-7).all()
    assert ((hidden.grad - exact).abs() <= 2e-3 * exact.abs() + 16 * 2e-7).all()


# --- the linear layer ----------------------------------------------------------------------------


def test_each_product_is_computed_once_and_only_if_wanted(monkeypatch):
    monkeypatch.setattr(passes, "rows_at_once", lambda rows, classes, device: 4)  # 7 rows: two chunks
    calls = []
    for owner, name in ((torch, "mm"), (torch.Tensor, "addmm_")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *a, _original=original, _name=name, **k: (calls.append(_name), _original(*a, **k))[1],
        )
    target = torch.randint(0, 30, (7,))
    for wanted, expected in [((), 2), ((0,), 4), ((1,), 4), ((0, 1), 6)]:
        tensors = [torch.randn(7, 8), torch.randn(30, 8)]
        for index in wanted:
            tensors[index].requires_grad_()
        calls.clear()
        value = kernels.linear_cross_entropy(*tensors, target)
        if wanted:
            got = torch.autograd.grad(value, [tensors[index] for index in wanted])
            assert len(calls) == expected
            exact = F.cross_entropy(tensors[0].double() @ tensors[1].double().T, target)
            want = torch.autograd.grad(exact, [tensors[index] for index in wanted])
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
        assert len(calls) == expected


def test_input_gradient_first_and_weight_gradient_later():
    """As a pipeline schedule asks for them."""
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.randint(0, 30, (7,))
    both = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, target), (hidden, weight))
    value = kernels.linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(value, hidden, retain_graph=True)
    later = torch.autograd.grad(value, weight)
    assert torch.equal(first[0], both[0])
    assert torch.equal(later[0], both[1])


def test_an_output_that_is_not_asked_for_is_not_made():
    """Autograd would fill a gradient of zeros, as large as the logits, for the second output."""
    logits, target = data(3, 5)
    value, made = loss._with_gradient(logits.requires_grad_(), target, None, -100, 0.0, "mean")
    assert value.requires_grad
    assert not made.requires_grad


MEMORY = """
import sys, torch
import torch.nn.functional as F
import kernels
from kernels.op import without_crossover
from labs.memory import extra_bytes

hidden, target = torch.randn(2048, 128), torch.randint(0, 32000, (2048,))
weight = torch.randn(32000, 128, requires_grad=True)
function = {
    "kernels": kernels.linear_cross_entropy,
    "torch": lambda hidden, weight, target: F.cross_entropy(hidden @ weight.T, target),
}[sys.argv[1]]

def step():
    torch.autograd.grad(function(hidden.requires_grad_(), weight, target), weight)

with without_crossover():
    extra = extra_bytes(step)
sys.exit(77) if extra is None else print(extra)
"""


def extra_memory(which):
    command = [sys.executable, "-c", MEMORY, which]
    environment = {**os.environ, "GLIBC_TUNABLES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    if done.returncode == 77:
        pytest.skip("peak memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_logits_never_exist_at_once():
    """Forward and backward of 2048 x 32000 logits, the gradients included: below a quarter of the logits."""
    logits = 2048 * 32000 * 4
    assert extra_memory("kernels") < logits / 4


@pytest.mark.proof
def test_the_measure_of_memory_sees_logits():
    assert extra_memory("torch") > 1.9 * 2048 * 32000 * 4
