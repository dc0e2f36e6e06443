"""The machine as data: curves, peaks, the cached file, spec sheets."""

import json
from dataclasses import replace

import pytest

from labs import machine as machines
from labs.machine import FORMAT, Curve, Machine, load_cached, load_sheet, save, sheet_names

NEEDED = {
    "vector_float32_all_flops",
    "matrix_bfloat16_all_flops",
    "memory_bytes",
    "memory_bytes_per_second",
    "l2_bytes",
    "launch_s",
    "transfer_bytes_per_second",
}


def example() -> Machine:
    curve = Curve((1e3, 1e5), (100.0, 10.0))
    return Machine("example", True, {"cores": 2.0, "vector_float32_1_flops": 1e9}, {"copy_1": curve})


def test_curve_is_linear_in_the_logarithm_and_flat_outside() -> None:
    curve = Curve((1e3, 1e5, 1e6), (100.0, 10.0, 4.0))
    assert curve.at(1) == curve.at(1e3) == 100
    assert curve.at(1e4) == pytest.approx(55)  # half-way in the logarithm
    assert curve.at(1e5) == pytest.approx(10)
    assert curve.at(1e9) == 4


def test_matrices_fall_back_to_vector_units_and_unknown_dtypes_are_named() -> None:
    assert example().peak("float32", unit="matrix") == 1e9
    with pytest.raises(ValueError, match="no peak for bfloat16"):
        example().peak("bfloat16", unit="matrix")


def test_the_rate_of_a_product_lies_between_the_squares_that_were_measured() -> None:
    rates = {"torch_product_10_float32_1_flops": 1e9, "torch_product_1000_float32_1_flops": 1e11}
    here = replace(example(), constants={**example().constants, **rates})
    assert here.product_rate(1.0) == here.product_rate(2e3) == pytest.approx(1e9)
    assert here.product_rate(2e6) == pytest.approx(1e10)  # half way, in both logarithms
    assert here.product_rate(1e15) == pytest.approx(1e11)
    assert here.product_rate(2e6, library="numpy") == here.peak("float32"), "of which none was measured"


def test_missing_constants_and_curves_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="no constant 'fork_s'; it has cores"):
        example()["fork_s"]
    with pytest.raises(ValueError, match="no bandwidth curve 'read_all'; it has copy_1"):
        example().bandwidth(1e4, kind="read", threads=0)


def test_a_saved_machine_comes_back_equal(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    gpu = Machine("gpu", False, {"launch_s": 1e-5}, facts={"kind": "gpu"}, sources={"launch_s": "a sheet"})
    original = Machine(**{**example().__dict__, "gpu": gpu, "measured_at": "now"})
    assert load_cached() is None
    path = save(original)
    assert path.parent == tmp_path
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no temporary file left
    loaded = load_cached()
    assert loaded is not None
    assert loaded.to_json() == original.to_json()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        json.dumps({"format": FORMAT}),
        json.dumps({"format": FORMAT, **example().to_json(), "curves": 3}),
        json.dumps({"format": FORMAT, **example().to_json(), "curves": {"copy_1": {"sizes": [1.0]}}}),
        json.dumps({"format": FORMAT, **example().to_json(), "gpu": {"name": "no constants"}}),
        json.dumps({"format": FORMAT - 1, **example().to_json()}),
    ],
)
def test_a_broken_or_older_file_is_no_calibration(tmp_path, monkeypatch, content) -> None:
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    machines.cache_path().write_text(json.dumps({"format": FORMAT, **example().to_json()}))
    assert load_cached() == replace(example(), curves={"copy_1": Curve([1e3, 1e5], [100.0, 10.0])})
    machines.cache_path().write_text(content)
    assert load_cached() is None


@pytest.mark.parametrize("name", sheet_names())
def test_every_sheet_is_complete_sourced_and_not_measured(name) -> None:
    sheet = load_sheet(name)
    assert not sheet.measured
    assert sheet.gpu is None
    assert set(sheet.constants) >= NEEDED
    assert all(value > 0 for value in sheet.constants.values())
    assert all(len(sheet.sources[key]) > 20 for key in sheet.constants)
    assert sheet.bandwidth(1e9, threads=0) == sheet["memory_bytes_per_second"]
    # Rates are dense: 2:4 sparsity would double the ratio that the vendor's table gives.
    assert 1.5 < sheet["matrix_bfloat16_all_flops"] / sheet["vector_float32_all_flops"] < 17


def test_sheets_name_the_promised_machines_and_a_wrong_name_gets_the_nearest() -> None:
    assert {"a100", "h100", "h200", "mi300x"} <= set(sheet_names())
    assert any("laptop" in name for name in sheet_names())
    assert load_sheet("H200").name == load_sheet("h200").name
    with pytest.raises(ValueError, match="no machine 'h20'; did you mean 'h200'"):
        load_sheet("h20")
