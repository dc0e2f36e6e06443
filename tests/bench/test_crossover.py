"""Where the crossover suite puts the size from which on our kernels serve better."""

import pytest
import torch

import kernels
from bench.stats import Comparison
from bench.suites.test_crossover import between, crossover_of
from kernels.spec import NEVER, sized


def speedups(*ratios):
    return [(2**power, Comparison(ratio, ratio, ratio, "same")) for power, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "crossover"),
    [
        ((0.2, 0.5, 0.9, 1.1, 1.5), 8),
        ((1.3, 1.5, 2.0), 0),  # never slower: no size for torch
        ((0.2, 0.5, 0.9), NEVER),
        ((0.2, 0.5, 1.2, 0.95, 1.4), 4),  # a hiccup does not move it
        ((0.2, 1.02, 0.5, 1.4), 8),
    ],
)
def test_the_crossover_is_where_the_wrong_choice_costs_least(ratios, crossover):
    assert crossover_of(speedups(*ratios)) == crossover


def test_the_interval_is_between_the_sizes_that_are_decided():
    found = [
        (size, Comparison((low + high) / 2, low, high, "same"))
        for size, low, high in [(1, 0.2, 0.3), (2, 0.8, 0.9), (4, 0.9, 1.1), (8, 0.95, 1.2), (16, 1.1, 1.3)]
    ]
    assert between(found) == [2, 16]
    assert between(found[:3]) == [2, NEVER]
    assert between(found[2:]) == [0, 16]
    assert between([(0, found[4][1]), *found[1:]]) == [2, 16]  # ours where nothing is to be done, not at 2


def test_adam_and_adamw_run_one_update_and_so_have_one_crossover(monkeypatch):
    asked = []
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: asked.append(name) or 0)
    for kind in (kernels.Adam, kernels.AdamW, type("Mine", (kernels.AdamW,), {})):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        kind([parameter], lr=0.1).step()
    assert asked == ["Adam"] * 3


def test_every_operation_can_be_run_at_any_size():
    """(8, 64) is where a choice costs most: each must be measured there."""
    missing = set(kernels.__all__) - {one.operation for one in sized()} - {"FallbackWarning", "AdamW"}
    assert not missing
    one = next(one for one in sized() if one.operation == "linear_int8")
    elements, ours, theirs = one.ways(8, 64, "cpu")
    assert elements == 8 * 64  # of the weight
    assert ours().shape == theirs().shape
