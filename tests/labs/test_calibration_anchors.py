"""Constants that a lab's formulas ask for go with the machine's speed; what holds is left alone."""

from dataclasses import replace

import pytest
from stated import machine as stated

from labs import calibration_anchors as anchors
from labs.calibration_anchors import Anchor
from labs.machine import Curve

MACHINE = stated(python_operation_s=1e-8, python_call_s=3e-8, fma_latency_s=1e-9, l2_bytes=1e6)


def anchor(constant, others, *values):
    """Stated values in a row."""
    rest = iter(values)
    return Anchor(f"all like {constant}", constant, others, lambda: next(rest))


PYTHON = r"python_\w+_s"


def test_what_runs_slower_takes_all_of_its_kind_along_and_nothing_else() -> None:
    slow = [anchor("python_operation_s", PYTHON, 2.0e-8, 2.1e-8, 1.9e-8)]
    found = anchors.speeds(MACHINE, {"python_call_s"}, slow)
    assert found == {"all like python_operation_s": pytest.approx(0.5)}
    now = anchors.at_speeds(MACHINE, found, slow)
    assert now["python_operation_s"] == pytest.approx(2e-8)
    assert now["python_call_s"] == pytest.approx(6e-8)
    assert now["fma_latency_s"] == 1e-9
    assert anchors.said([found]) == "all like python_operation_s at 0.50x of the calibrated speed"


def test_a_rate_and_a_curve_beyond_a_cores_caches_go_with_it() -> None:
    curve = Curve((1e4, 1e8), (9e10, 8e9))
    machine = replace(MACHINE, curves={**MACHINE.curves, "copy_1": curve})
    slow = [
        anchor("vector_float32_1_flops", r"\w+_flops|\w+_latency_s", 25e9, 25e9, 25e9),
        anchor("copy_1", r"(copy|read)_\w+", *[curve.at(anchors.STREAM_BYTES) / 4] * 3),
    ]
    found = anchors.speeds(machine, {"fma_latency_s", "read_all"}, slow)
    now = anchors.at_speeds(machine, found, slow)
    assert now["vector_float32_all_flops"] == pytest.approx(50e9)
    assert now["fma_latency_s"] == pytest.approx(2e-9)
    assert now.curves["copy_1"].bytes_per_second == pytest.approx([9e10, 2e9])


@pytest.mark.parametrize("values", [(1e-8, 1.01e-8, 0.99e-8), (2e-8, 0.9e-8, 1.1e-8)])
def test_what_scatters_as_much_as_it_is_off_changes_nothing(values) -> None:
    found = anchors.speeds(MACHINE, {"python_call_s"}, [anchor("python_operation_s", PYTHON, *values)])
    assert found == {}
    assert anchors.at_speeds(MACHINE, found) is MACHINE
    assert anchors.said([found]) == ""


def test_kinds_that_no_formula_asks_for_are_not_measured() -> None:
    nothing = [
        anchor("python_operation_s", PYTHON),
        anchor("jax_call_s", r"jax_\w+"),
    ]  # would run out of values
    assert anchors.speeds(MACHINE, {"fma_latency_s"}, nothing) == {}
    assert anchors.speeds(MACHINE, {"jax_wake_s"}, nothing) == {}, "this machine has no JAX"


def test_formulas_say_what_they_ask_for() -> None:
    asked = anchors.asked_of(
        MACHINE, lambda it: (it["python_call_s"], it.get("no_such"), it.peak("float32"), it.bandwidth(1e6))
    )
    assert asked == {"python_call_s", "vector_float32_1_flops", "copy_1"}
    rates = replace(MACHINE, constants={f"torch_product_{side}_float32_1_flops": 1e9 for side in (64, 256)})
    assert anchors.asked_of(rates, lambda it: it.product_rate(1e6)) == set(rates.constants)


def test_each_kind_is_measured_again_in_a_moment() -> None:
    for each in anchors._anchors():
        assert each.goes_with(each.constant)
        assert each.measure() > 0


def test_several_checks_are_said_from_the_least_to_the_greatest():
    said = anchors.said([{"calls": 0.5, "memory": 1.1}, {}, {"calls": 0.75}])
    assert said == "calls at 0.50 to 0.75x, memory at 1.10x of the calibrated speed"
