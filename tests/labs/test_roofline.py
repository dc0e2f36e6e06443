"""The roofline lab: its formula by hand, its proof against broken outputs, its claims on stated times."""

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from stated import Stated, machine

from labs import figure as figures
from labs.lab import configure, find
from labs.machine import load_sheet, sheet_names
from labs.roofline import LAB, charts, claims, machine_chart, model, prediction
from labs.roofline.operations import make_inputs, operations, product

SMALL = {"cache_elements": 4096, "memory_elements": 40_000, "rows": 37, "matvec": 129, "matrix": 96}


def predicted_results(**times: float) -> Stated:
    """What would be measured if every prediction came true, with some times replaced."""
    config = configure(LAB, "quick")
    columns = {}
    for mode in LAB.columns:
        found = {each.variant: each.value for each in LAB.predict(config, machine().with_allocator(mode))}
        columns[mode] = found | {name.replace("__", "/"): seconds for name, seconds in times.items()}
    return Stated(config, machine(), columns)


# --- the formula -----------------------------------------------------------------------------------


def operation(group: str, config: Any = None) -> Any:
    config = config or configure(LAB, "quick")
    return next(each for each in operations(config) if each.group == group)


def test_an_addition_from_memory_by_hand() -> None:
    add = operation("add_memory")
    count = 2**23
    # 8 bytes read at 20 GB/s; 4 written at 2 / 16 GB/s less 1 / 20 GB/s; a call and a parallel region.
    expected = 3e-6 + count * (8 / 20e9 + 4 * (2 / 16e9 - 1 / 20e9))
    seconds, because = model.cpu_seconds(add, machine().with_allocator("tuned"))
    assert seconds == pytest.approx(expected)
    assert "memory" in because
    # Under the default allocator the 32 MiB output is faulted in, and then lies in the cache.
    seconds, because = model.cpu_seconds(add, machine())
    assert seconds == pytest.approx(3e-6 + count * 8 / 20e9 + 4 * count * 0.5e-9)
    assert "page faults" in because


def test_our_kernels_fault_huge_pages_in_where_there_are_any() -> None:
    host = machine(huge_page_fault_all_s_per_byte=0.1e-9)
    gelu = operation("gelu_memory")
    found = {each.variant: each.value for each in LAB.predict(configure(LAB, "quick"), host) if each.variant}
    assert found["gelu_memory/cpu"] - found["gelu_memory/kernels"] == pytest.approx(gelu.writes * 0.4e-9)
    without, _ = model.cpu_seconds(gelu, machine(), ours=True)
    assert without == pytest.approx(found["gelu_memory/cpu"])


def test_a_product_is_limited_by_the_units_of_its_dtype() -> None:
    config = configure(LAB, "quick")
    wide, narrow = (each for each in operations(config) if each.group == "matmul_large")
    assert model.cpu_seconds(wide, machine())[0] == pytest.approx(3e-6 + 2 * 1024**3 / 100e9)
    assert model.cpu_seconds(narrow, machine())[0] == pytest.approx(3e-6 + 2 * 1024**3 / 200e9)
    constants = {key: value for key, value in machine().constants.items() if "bfloat16" not in key}
    without = replace(machine(), constants=constants)
    assert model.cpu_seconds(narrow, without)[0] == pytest.approx(
        model.cpu_seconds(wide, without)[0], rel=1e-3
    )


def test_small_work_runs_on_one_thread_and_costs_a_call() -> None:
    seconds, because = model.cpu_seconds(operation("add_one"), machine())
    assert seconds == pytest.approx(1e-6, rel=0.01)
    assert "1 thread" in because


def test_some_of_many_cores_are_that_many_single_ones_up_to_all() -> None:
    assert model.cores_rate(10, 50, 1, 64) == 10
    assert model.cores_rate(10, 50, 3, 64) == 30
    assert model.cores_rate(10, 50, 8, 64) == 50
    assert model.cores_rate(10, 50, 64, 64) == 50


def test_gpu_time_is_launch_and_the_larger_of_two_limits() -> None:
    gpu = load_sheet("h200")
    add = operation("add_memory")
    assert model.gpu_seconds(add, gpu)[0] == pytest.approx(gpu["launch_s"] + 12 * 2**23 / 4.8e12)
    large = product("x", 8192, "bfloat16")
    assert model.gpu_seconds(large, gpu)[0] == pytest.approx(gpu["launch_s"] + 2 * 8192**3 / 989.5e12)


def test_the_crossover_is_where_the_two_predictions_meet() -> None:
    gpu, family = load_sheet("h200"), prediction.FAMILIES[0].operation
    here = machine().with_allocator("tuned")
    size = model.crossover(family, here, gpu)
    assert size is not None
    below, above = family(round(size / 1.3)), family(round(size * 1.3))
    assert model.gpu_seconds(below, gpu)[0] > model.cpu_seconds(below, here)[0]
    assert model.gpu_seconds(above, gpu)[0] < model.cpu_seconds(above, here)[0]
    far = model.crossover(family, here, gpu, with_transfer=True)
    assert far is None or far > size
    slow = replace(gpu, constants={**gpu.constants, "launch_s": 100.0})
    assert model.crossover(family, here, slow) is None


# --- predictions and variants ----------------------------------------------------------------------


def test_every_cpu_variant_is_predicted_with_its_numbers_and_a_suspect() -> None:
    config = configure(LAB, "quick")
    for mode in LAB.columns:
        found = {each.variant: each for each in LAB.predict(config, machine().with_allocator(mode))}
        here = [each.address for each in LAB.variants(config) if not each.name.startswith("cuda")]
        assert set(found) == set(here)
        assert len(found) >= 12
        for each in found.values():
            assert each.key == "time_s"
            assert 0 < each.value < 10
            assert each.because
            assert each.suspect


def test_a_sheet_predicts_its_gpu_and_nothing_else() -> None:
    config = configure(LAB, "quick")
    for name in sheet_names():
        found = LAB.predict(config, load_sheet(name))
        assert {each.variant.split("/")[1].split("_")[0] for each in found} == {"cuda"}
        assert len(found) == len(operations(config))


def test_a_measured_gpu_stands_beside_the_cpu_with_its_crossovers() -> None:
    with_gpu = replace(machine(), gpu=replace(load_sheet("a100"), measured=True))
    found = LAB.predict(configure(LAB, "quick"), with_gpu)
    assert {each.key for each in found if not each.variant} == {each.key for each in prediction.FAMILIES}
    assert sum(each.variant.endswith("/cuda") for each in found) == sum(
        each.variant.endswith("/cpu") for each in found
    )


def test_importing_the_lab_loads_no_heavy_package() -> None:
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('roofline');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "from labs.machine import load_sheet; lab.predict(config, load_sheet('h200'));"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"memory_elements": 0}, "memory_elements=0 is below the minimum"),
        ({"versus": "h20"}, "did you mean 'h200'"),
        ({"matrx": 3}, "did you mean 'matrix'"),
    ],
)
def test_wrong_settings_are_named(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        configure(LAB, "quick", setting)


# --- proof -----------------------------------------------------------------------------------------

CONFIG = configure(LAB, "quick", SMALL)


@pytest.mark.parametrize(
    "address", [each.address for each in LAB.variants(CONFIG) if not each.name.startswith("cuda")]
)
def test_each_operation_passes_its_check_and_a_wrong_element_does_not(address) -> None:
    import torch

    step = find(LAB, CONFIG, address).setup(CONFIG, None)
    output = step()
    (proof,) = LAB.check(CONFIG, {address: output})
    assert proof.passed, proof
    repeated = step()
    assert torch.equal(output, repeated)
    wrong = output.clone()
    wrong.view(-1)[-1] += 0.05 * output.abs().max()
    # The last row is looked at whenever there are at most CHECKED_ROWS of them.
    assert not LAB.check(CONFIG, {address: wrong})[0].passed
    assert not LAB.check(CONFIG, {address: torch.full_like(output, math.nan)})[0].passed
    assert not LAB.check(CONFIG, {address: output.unsqueeze(0)})[0].passed  # another shape
    with pytest.raises(TypeError, match=r"torch\.Tensor is needed"):
        LAB.check(CONFIG, {address: None})


def test_operations_count_what_their_tensors_hold() -> None:
    import torch

    for each in operations(CONFIG):
        inputs = make_inputs(torch, each)
        output = each.function(torch)(*inputs)
        assert output.nbytes == each.writes, each.group
        vectors = sum(tensor.nbytes for tensor in inputs)
        assert vectors * 0.9 <= each.reads <= vectors, (
            each.group
        )  # weights and biases of a row count as nothing
        if each.unit == "matrix":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                each.function(torch)(*inputs)
            assert counter.get_total_flops() == each.flops, each.group


# --- claims, derived quantities and figures ----------------------------------------------------------


def test_all_claims_hold_when_the_predictions_come_true() -> None:
    results = predicted_results()
    assert [claim.holds(results) for claim in LAB.claims] == [True] * len(LAB.claims)


@pytest.mark.parametrize(
    ("claim", "times", "verdict"),
    [
        (claims.product_computes_more, {"matmul_large__cpu": 1.0}, False),
        (claims.cache_is_faster, {"add_cache__cpu": 1.0}, False),
        (claims.small_work_is_overhead, {"add_one__cpu": 1e-9}, False),
        (claims.bfloat16_follows_the_units, {"matmul_large__cpu_bfloat16": 1.0}, False),
        (
            claims.fresh_memory_costs_more_than_the_work,
            {"relu_memory__cpu": 5e-3, "add_memory__cpu": 5e-3},
            False,
        ),
    ],
)
def test_each_claim_can_fail(claim, times, verdict) -> None:
    assert claim(predicted_results(**times)) is verdict


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim) -> None:
    empty = Stated(configure(LAB, "quick"), machine(), {})
    assert claim.holds(empty) is None


def test_a_cache_larger_than_the_vectors_decides_nothing_about_memory() -> None:
    results = predicted_results()
    server = replace(results, machine=machine(l3_bytes=384e6))
    assert claims.cache_is_faster(server) is None


def test_the_measured_crossover_lies_where_the_times_cross() -> None:
    times = {}
    for family in prediction.FAMILIES:
        for group, size in family.groups(configure(LAB, "quick")):
            times[f"{group}__cpu"], times[f"{group}__cuda"] = 1e-9 * size, 1e-6
    found = {each.key: each.interval for each in LAB.derive(predicted_results(**times))}
    assert set(found) == {family.key for family in prediction.FAMILIES}
    for interval in found.values():
        assert interval.value == pytest.approx(1000, rel=0.01)
        assert interval.low < interval.value < interval.high
    assert LAB.derive(predicted_results()) == []


def test_figures_carry_their_numbers_and_survive_json() -> None:
    drawn = LAB.figure(predicted_results())
    assert len(drawn) == 4
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)
        for series in each.series:
            assert len(series.x) == len(series.y) > 0
            assert all(math.isfinite(value) and value > 0 for value in (*series.x, *series.y))
            assert not series.labels or len(series.labels) == len(series.x)
    names = [series.name for series in drawn[0].series]
    assert any("not measured" in name for name in names)
    assert any(series.style == "points" and series.labels for series in drawn[0].series)
    assert "L3" in drawn[1].note
    assert "wins from" in drawn[2].note
    assert "Not measured" in drawn[2].note


def test_no_stated_point_lies_above_its_roof() -> None:
    drawn = charts.operations_chart(predicted_results(), load_sheet("h200"))
    points = next(series for series in drawn.series if series.style == "points")
    roof = next(series for series in drawn.series if series.name.startswith("CPU bfloat16"))
    for x, y, label in zip(points.x, points.y, points.labels, strict=True):
        limit = min(200e9, 80e9 * x)  # the cache's roof: the highest there is
        assert y <= limit * 1.01, label
    assert max(roof.y) == 200e9


@pytest.mark.parametrize("name", ["measured", *sheet_names()])
def test_the_machine_chart_draws_a_calibration_and_any_sheet(name) -> None:
    chart = machine_chart(machine() if name == "measured" else load_sheet(name))
    assert len(chart.series) >= 2
    assert all(series.style == "dashed" for series in chart.series)
    assert ("not measured" in chart.series[0].name) == (name != "measured")


@pytest.mark.gpu
def test_cuda_variants_compute_the_same() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for each in operations(CONFIG):
        address = each.address("cuda")
        output = find(LAB, CONFIG, address).setup(CONFIG, None)()
        (proof,) = LAB.check(CONFIG, {address: output})
        assert proof.passed, proof
