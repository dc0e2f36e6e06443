"""Which operations took the time: sums, shapes, rates; and TraceLens's table of the same trace."""

import csv
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables_of_events import COMPUTE_STREAM, MAIN, launched, trace

from bench.traces import tree
from bench.traces.events import Kind
from bench.traces.load import load
from bench.traces.operations import NO_OPERATOR, kernels, operations, operator_behind
from bench.traces.roof import Roof, roof_of
from labs import machine

TRACES = Path(__file__).resolve().parents[4] / "shared" / "traces"
REFERENCE = TRACES / "ref" / "tracelens_h100_qwen0.5b"
has_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the real traces are not beside this checkout"
)


def everything(made, roof=None, limit=100):
    """(operations, sums, kernels) of all rows."""
    parents, launches = tree.parents(made.events), tree.launched_by(made.events)
    behind = operator_behind(made, parents, launches)
    rows = np.ones(len(made.events), bool)
    own = tree.self_time(made.events, parents)
    return *operations(made, rows, own, behind, roof, limit), kernels(made, rows, behind)


def two_products():
    """A linear layer called twice, once with another shape; each launches one kernel from its addmm."""
    return trace(
        [
            (Kind.OPERATOR, "aten::linear", MAIN, 0, 100, {"shape": "[[8, 4]]"}),
            (Kind.OPERATOR, "aten::addmm", MAIN, 10, 90, {"shape": "[[8, 4], [4, 4]]", "flops": 256.0}),
            *launched(1, "gemm", 20, 30, 70),
            (Kind.OPERATOR, "aten::linear", MAIN, 200, 260, {"shape": "[[2, 4]]"}),
            (Kind.OPERATOR, "aten::addmm", MAIN, 210, 250, {"shape": "[[2, 4], [4, 4]]", "flops": 64.0}),
            *launched(2, "gemm", 220, 230, 240),
            *launched(3, "memset", 300, 310, 320, kind=Kind.SET),
        ]
    )


def test_operations_are_told_apart_by_the_shapes_of_their_inputs():
    found, sums, _ = everything(two_products())
    rows = {(one.name, one.shape): one for one in found}
    large = rows["aten::addmm", "[[8, 4], [4, 4]]"]
    assert (large.calls, large.time, large.self_time, large.device_time) == (1, 80, 75, 40)
    assert rows["aten::linear", "[[8, 4]]"].self_time == 20
    assert rows["aten::linear", "[[8, 4]]"].device_time == 0  # direct: what its addmm launched is addmm's
    launches = rows["cudaLaunchKernel", ""]
    assert (launches.kind, launches.calls, launches.self_time) == (Kind.RUNTIME, 3, 15)
    assert sums.count == len(found) == 5
    assert sums.self_time == 100 + 60 + 5
    assert sums.device_time == 50


def test_rates_are_over_device_time_and_held_against_the_roof():
    found, _, _ = everything(two_products(), Roof(12.8e9, "float32 peak"))
    rates = {one.shape: (one.flops_per_second, one.of_roof) for one in found if one.flops}
    assert rates["[[8, 4], [4, 4]]"] == pytest.approx((256 / 40e-9, 0.5))
    assert rates["[[2, 4], [4, 4]]"] == pytest.approx((64 / 10e-9, 0.5))
    assert all(one.flops_per_second is None for one in found if not one.flops)


def test_on_a_host_alone_rates_are_over_its_own_time():
    made = trace([(Kind.OPERATOR, "aten::mm", MAIN, 0, 50, {"flops": 100.0})])
    found, _, _ = everything(made)
    assert found[0].flops_per_second == pytest.approx(2e9)
    assert found[0].of_roof is None


def test_kernels_know_the_operator_that_launched_them():
    _, _, found = everything(two_products())
    gemm, fill = found
    assert (gemm.name, gemm.calls, gemm.time, gemm.shortest, gemm.longest) == ("gemm", 2, 50, 10, 40)
    assert (gemm.operator, gemm.operators) == ("aten::addmm", 1)
    assert (fill.operator, fill.operators) == (NO_OPERATOR, 0)


def test_a_launch_from_a_function_inside_an_operator_is_the_operators():
    made = trace(
        [
            (Kind.OPERATOR, "triton_fused_add", MAIN, 0, 100),
            (Kind.FUNCTION, "launcher.py(7): run", MAIN, 10, 90),
            *launched(1, "add_kernel", 20, 30, 70),
        ]
    )
    assert everything(made)[2][0].operator == "triton_fused_add"


def test_copies_have_a_rate_only_over_those_whose_size_is_known():
    made = trace(
        [
            (Kind.COPY, "Memcpy HtoD", COMPUTE_STREAM, 0, 10, {"bytes": 1000}),
            (Kind.COPY, "Memcpy HtoD", COMPUTE_STREAM, 20, 90),
            (Kind.KERNEL, "gemm", COMPUTE_STREAM, 90, 95),
        ]
    )
    rates = {one.name: one.bytes_per_second for one in everything(made)[2]}
    assert rates == {"Memcpy HtoD": pytest.approx(1e11), "gemm": None}


def test_the_list_is_limited_and_the_sums_are_not():
    made = trace([(Kind.OPERATOR, f"op {i}", MAIN, 100 * i, 100 * i + i + 1) for i in range(20)])
    found, sums, _ = everything(made, limit=3)
    assert [one.name for one in found] == ["op 19", "op 18", "op 17"]
    assert (sums.count, sums.self_time) == (20, 210)
    assert sums.by_kind == {Kind.OPERATOR: 210}


CALLS = st.tuples(st.sampled_from("abc"), st.sampled_from(["", "[1]", "[2]"]), st.integers(0, 9))


@given(st.lists(CALLS, max_size=20), st.booleans())
def test_sums_equal_those_of_a_dictionary(calls, many_names):
    rows, at, expected = [], 0, defaultdict(lambda: [0, 0])
    for name, shape, length in calls:
        more = {"shape": shape} if shape else {}
        rows.append((Kind.OPERATOR, name, MAIN, at, at + length, more))
        at += length + 1
        expected[name, shape][0] += 1
        expected[name, shape][1] += length
    made = trace(rows)
    if many_names:  # so many that rows are sorted instead of a table of all combinations
        made.names += [f"unused {i}" for i in range(90_000)]
    found, sums, _ = everything(made)
    assert {(one.name, one.shape): [one.calls, one.self_time] for one in found} == dict(expected)
    assert [one.self_time for one in found] == sorted((one.self_time for one in found), reverse=True)
    assert sums.self_time == sum(length for _, _, length in calls)


def test_the_roof_is_only_for_a_trace_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    lab, device = {"host": os.uname().nodename}, {"device": "NVIDIA H100"}
    row = [(Kind.OPERATOR, "aten::mm", MAIN, 0, 50)]
    assert roof_of(trace(row, facts=lab)) is None  # nothing is calibrated
    assert roof_of(trace(row, facts=device)) is None
    here = machine.Machine("here", True, {"vector_float32_all_flops": 1e11})
    here = replace(here, gpu=machine.Machine("NVIDIA H100", True, {"matrix_bfloat16_all_flops": 9e14}))
    machine.save(here)
    assert roof_of(trace(row, facts=lab)) == Roof(1e11, "float32 peak")
    assert roof_of(trace(row, facts={"host": f"not {lab['host']}"})) is None
    assert roof_of(trace(row)) is None
    assert roof_of(trace(row, facts=device)) == Roof(9e14, "bfloat16 peak")
    assert roof_of(trace(row, facts={"device": "AMD Instinct MI300X", **lab})) is None


@has_reference
def test_equals_the_tables_of_tracelens():
    read = load(TRACES / "tracelens_h100_qwen0.5b.json.gz").traces[0]
    found, _, ours = everything(read, limit=1000)
    by_operator: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for one in found:
        if one.device_time:
            by_operator[one.name][1] += one.device_time / 1e3
    with open(REFERENCE / "ops_summary.csv") as file:
        theirs = {row["name"]: float(row["total_direct_kernel_time_sum"]) for row in csv.DictReader(file)}
    assert {name: value for name, (_, value) in by_operator.items()} == pytest.approx(theirs, abs=0.02)

    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    with open(REFERENCE / "kernel_summary.csv") as file:
        for row in csv.DictReader(file):
            by_kernel[row["Kernel name"]][0] += int(row["Kernel duration (µs)_count"])
            by_kernel[row["Kernel name"]][1] += float(row["Kernel duration (µs)_sum"])
    expected = {name: pytest.approx(sums, abs=1e-3) for name, sums in by_kernel.items()}
    assert {one.name: [one.calls, one.time / 1e3] for one in ours if one.kind is Kind.KERNEL} == expected
