"""FLOPs from the dimensions of an operator's inputs: two for each multiply-add."""

import pytest

from bench.traces.flops import flops_of


@pytest.mark.parametrize(
    ("name", "shape", "flops"),
    [
        ("aten::mm", "[[4, 8], [8, 3]]", 2 * 4 * 8 * 3),
        ("aten::addmm", "[[3], [4, 8], [8, 3], [], []]", 2 * 4 * 8 * 3),
        ("aten::bmm", "[[5, 4, 8], [5, 8, 3]]", 5 * 2 * 4 * 8 * 3),
        ("aten::baddbmm", "[[5, 4, 3], [5, 4, 8], [5, 8, 3]]", 5 * 2 * 4 * 8 * 3),
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "[[2, 3, 16, 8], [2, 3, 32, 8], [2, 3, 32, 8]]",
            98304,
        ),
        ("aten::linear", "[[4, 8], [3, 8], [3]]", 0),  # its addmm is counted
        ("aten::mm", "[[4, 8]]", 0),
        ("aten::mm", "[[], []]", 0),
        ("aten::mm", '[["a"], {}]', 0),
        ("aten::mm", "[[1e999, 8], [8, 3]]", 0),
        ("aten::mm", "not dimensions", 0),
    ],
)
def test_flops_of_one_call(name, shape, flops):
    assert flops_of(name, shape) == flops
