"""The halves of a backward, apart: together they do what one backward does, and no operation twice."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import kernels.op
from parallel.pipeline_split import Sources, Split


class Counted(TorchDispatchMode):
    """How often each operation was called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls[function._schema.name.split("::")[1]] += 1
        return function(*arguments, **(options or {}))


class Residual(nn.Module):
    """A block of a transformer without attention, by torch or by the kernels."""

    def __init__(self, functional):
        super().__init__()
        self.functional = functional
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        y = self.functional.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
        return x + self.down(torch.tanh(self.up(y)))


class Scaled(torch.autograd.Function):
    """x * weight, which computes both gradients whatever is asked for."""

    calls = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        Scaled.calls += 1
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(Scaled.apply(x, self.weight))


class Twice(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.linear, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.own(torch.tanh(self.linear(x))))


class Tokens(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.middle(self.embedding(x)) @ self.embedding.weight.T


def whole(module, x):
    """(gradient of x, gradients by name, operations) of one backward."""
    module.zero_grad()
    y = module(x)
    gradient = torch.arange(y.numel()).view(y.shape).sin().to(y.dtype)
    with Counted() as counted:
        y.backward(gradient)
    found = {name: one.grad.clone() for name, one in module.named_parameters()}
    module.zero_grad()
    of_input, x.grad = x.grad, None
    return gradient, of_input, found, counted.calls


def halves(module, x, sources=None):
    """(gradient of x, names with gradients after the first half, split, operations of both)."""
    y = module(x)
    gradient = torch.arange(y.numel()).view(y.shape).sin().to(y.dtype)
    ends = [get_gradient_edge(x)] if x.requires_grad else sources.take()
    split = Split([get_gradient_edge(y)], ends)
    with Counted() as first:
        of_input = split.inputs([gradient])
    early = {name for name, one in module.named_parameters() if one.grad is not None}
    with Counted() as second:
        split.weights()
    return of_input, early, split, first.calls, second.calls


@pytest.mark.parametrize(
    ("build", "early"),
    [
        (lambda: nn.Sequential(Residual(nn.functional), Residual(nn.functional)), set()),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), set()),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten()), set()),
        (WithFunction, {"weight"}),
        (Twice, {"linear.weight", "linear.bias"}),
    ],
)
def test_halves_are_the_whole(build, early):
    torch.manual_seed(0)
    module, x = build(), torch.randn(5, 8, requires_grad=True)
    _, of_input, expected, calls = whole(module, x)
    Scaled.calls = 0
    (found,), at_once, split, first, second = halves(module, x)
    torch.testing.assert_close(found, of_input)
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], msg=name)
    assert at_once == early
    assert len(split.early) == len(early)
    for name in ("mm", "addmm", "bmm"):
        assert first[name] + second[name] == calls[name], name
    assert Scaled.calls <= 1


def test_the_second_half_has_the_weights_matrix_products():
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    _, _, _, first, second = halves(module, torch.randn(5, 8, requires_grad=True))
    assert (first["mm"], second["mm"]) == (3, 3)


def test_kernels_split():
    """Their backward reads what is asked for: the norm's weight gradient is computed in the second half."""
    torch.manual_seed(0)
    module, x = Residual(kernels), torch.randn(5, 8, requires_grad=True)
    with kernels.op.without_crossover():
        _, of_input, expected, _ = whole(module, x)
        (found,), early, _, first, second = halves(module, x)
    torch.testing.assert_close(found, of_input)
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], msg=name)
    assert early == set()
    assert (first["norm_backward_input"], second["norm_backward_weight"]) == (1, 1)
    assert first["norm_backward_weight"] == second["norm_backward_input"] == 0


def test_where_inputs_have_no_gradient_the_first_modules_end_the_chain():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    sources, x = Sources(module), torch.tensor([1, 5, 5])
    _, _, expected, calls = whole(module, x)
    sources.take()
    _, early, _, first, second = halves(module, x, sources)
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], msg=name)
    assert early == set()
    assert first["mm"] == 2
    assert first["mm"] + second["mm"] == calls["mm"]
    assert (first["embedding_dense_backward"], second["embedding_dense_backward"]) == (0, 1)


def test_a_weight_that_is_embedding_and_head():
    torch.manual_seed(0)
    module = Tokens()
    sources, x = Sources(module), torch.tensor([1, 5, 5])
    _, _, expected, calls = whole(module, x)
    sources.take()
    _, early, _, first, second = halves(module, x, sources)
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], msg=name)
    assert early == {"embedding.weight"}
    for name in ("mm", "embedding_dense_backward"):
        assert first[name] + second[name] == calls[name], name


def test_functional_stage_without_sources_leaves_all_to_the_second_half():
    weight = nn.Parameter(torch.randn(4))
    split = Split([get_gradient_edge((weight * 2).sum())], [])
    split.inputs([torch.tensor(1.0)])
    assert weight.grad is None
    split.weights()
    assert weight.grad.tolist() == [2.0] * 4
