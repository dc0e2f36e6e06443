"""Where the crossover suite puts the size from which on our kernels serve better."""

import pytest

import kernels
from bench.stats import Comparison
from bench.suites.test_crossover import crossover_of
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


def test_every_operation_can_be_run_at_any_size():
    """(8, 64) is where a choice costs most: each must be measured there."""
    missing = set(kernels.__all__) - {one.operation for one in sized()} - {"FallbackWarning"}
    assert not missing
    one = next(one for one in sized() if one.operation == "linear_int8")
    elements, ours, theirs = one.ways(8, 64, "cpu")
    assert elements == 8 * 64  # of the weight
    assert ours().shape == theirs().shape
