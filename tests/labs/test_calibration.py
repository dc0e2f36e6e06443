"""Calibration: the micro-kernels compute what they say, at full width; the figures are plausible."""

import platform
import re
import time
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest

from kernels import fresh_memory, peaks, peaks_matrix
from kernels.fresh_memory import huge_page_bytes, in_huge_pages
from labs import (
    calibration,
    calibration_calls,
    calibration_child,
    calibration_compilers,
    calibration_facts,
    calibration_links,
    calibration_processes,
)
from labs import calibration_hardware as hardware
from labs.calibration_gpu import sheet_of
from labs.machine import Curve, Machine, usable_cores

ON_X86 = platform.machine() == "x86_64"
GRAIN = peaks.STREAMS * peaks.LANES32


def assembly(function, **options) -> str:
    """Compiled anew: what comes from the cache cannot be inspected."""
    from numba import njit

    compiled = njit(function.nopython_signatures[:1], nogil=True, **options)(function.py_func)
    return next(iter(compiled.inspect_asm().values()))


def plausible_machine() -> Machine:
    sizes = (2.0**15, 2.0**26)
    curves = {name: Curve(sizes, (1e11, 1e10)) for name in ("copy_1", "read_1", "copy_all", "read_all")}
    constants = {
        "cores": 2.0,
        "vector_float32_1_flops": 1e11,
        "vector_float32_all_flops": 2e11,
        "scalar_float32_flops": 1e10,
        "python_operation_s": 1e-8,
    }
    return Machine("plausible", True, constants, curves, measured_at="then")


# --- kernels ---------------------------------------------------------------------------------------


def test_chains_converge_to_their_fixed_point() -> None:
    # x = 0.999 x + 0.001 tends to 1 in every lane of every chain.
    assert peaks.fma32(50_000) == pytest.approx(peaks.LANES32 * peaks.CHAINS, rel=1e-3)
    assert peaks.fma64(50_000) == pytest.approx(peaks.LANES64 * peaks.CHAINS, rel=1e-9)
    assert peaks.fma_scalar(50_000) == pytest.approx(peaks.CHAINS, rel=1e-3)
    assert peaks.fma_latency(50_000) == pytest.approx(1, rel=1e-3)


def test_additions_wait_for_one_another_and_packed_loops_compute_what_they_say() -> None:
    assert peaks.add_latency(1000) == pytest.approx(1, rel=1e-3)
    source = np.random.default_rng(2).uniform(0.5, 5, 1003).astype(np.float32)
    for function, expected in ((peaks.packed_exp, np.exp(-source)), (peaks.packed_division, 1.5 / source)):
        target = np.zeros_like(source)
        function(target, source, 2)
        np.testing.assert_allclose(target, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [0, GRAIN, 7 * GRAIN])
def test_copy_and_read_touch_every_element(count) -> None:
    source = np.random.default_rng(1).random(count, dtype=np.float32)
    target = np.full(count, np.nan, np.float32)
    peaks.copy(target, source, 1)
    np.testing.assert_array_equal(target, source * np.float32(1.0001))
    assert peaks.read(source, 1) == pytest.approx(float(source.sum(dtype=np.float64)), rel=1e-5)


def test_fill_gives_spread_random_numbers_and_touch_writes_each_page() -> None:
    values = np.zeros(10_000, np.float32)
    peaks.fill(values, 3)
    assert 0.5 <= values.min() < 0.51
    assert 1.49 < values.max() < 1.5
    assert len(np.unique(values)) > 9_900
    pages = np.zeros(3 * peaks.PAGE_BYTES, np.uint8)
    peaks.touch(pages)
    assert pages.sum() == 3
    assert pages[:: peaks.PAGE_BYTES].all()


@pytest.mark.skipif(not ON_X86, reason="names of x86 features")
def test_the_width_is_what_the_system_says_of_the_cpu() -> None:
    flags = next(calibration_facts._cpu_lines("flags"), "").split()
    if not flags:
        pytest.skip("no /proc/cpuinfo")
    assert (512 if "avx512f" in flags else 256 if "avx" in flags else 128) == peaks.BITS
    assert ("fma" in flags) == peaks.FUSED
    assert ("avx512_bf16" in flags) == peaks_matrix.HAS_DOT_BF16


@pytest.mark.skipif(not ON_X86, reason="names of x86 registers")
def test_peaks_use_the_widest_registers_and_the_scalar_one_none() -> None:
    register = {512: "%zmm", 256: "%ymm", 128: "%xmm"}[peaks.BITS]
    for function in (peaks.fma32, peaks.fma64, peaks.copy, peaks.read):
        assert register in assembly(function), function
    if peaks.FUSED:
        assert len(re.findall(r"vfmadd\w+ps\b", assembly(peaks.fma32))) >= peaks.CHAINS
        scalar = assembly(peaks.fma_scalar)
        assert len(re.findall(r"vfmadd\w+ss\b", scalar)) >= peaks.CHAINS
        assert not re.findall(r"vfmadd\w+ps\b", scalar)
    assert "memcpy" not in assembly(peaks.copy)
    for function in (peaks.packed_exp, peaks.packed_division):
        assert register in assembly(function, error_model="numpy", fastmath={"contract"}), function
    assert re.search(r"vadd\w*ss\b", assembly(peaks.add_latency))


@pytest.mark.skipif(not peaks_matrix.HAS_DOT_BF16, reason="this CPU has no AVX-512 BF16")
def test_the_bfloat16_kernel_uses_the_dot_instruction() -> None:
    function = peaks_matrix._compile_dot_bf16()
    assert len(re.findall(r"vdpbf16ps\s+%zmm", assembly(function))) >= peaks.CHAINS
    few, many = function(0), function(0x10000)
    assert few == pytest.approx(16 * sum(range(peaks.CHAINS)))
    assert many > few


@pytest.mark.skipif(not ON_X86, reason="needs LLVM's x86 target")
def test_tiles_compile_to_four_independent_products_between_configuration_and_release() -> None:
    import llvmlite.binding as llvm
    from llvmlite import ir

    pointer = ir.IntType(8).as_pointer()
    module = ir.Module()
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [ir.IntType(64), pointer, pointer]), "tiles"
    )
    builder = ir.IRBuilder(function.append_basic_block())
    peaks_matrix.emit_tiles(builder, *function.args)
    builder.ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu="sapphirerapids", features="+amx-tile,+amx-bf16", opt=3
    )
    text = target.emit_assembly(llvm.parse_assembly(str(module)))
    products = re.findall(r"tdpbf16ps\s+%tmm(\d), %tmm(\d), %tmm(\d)", text)
    assert sorted(target for *_, target in products) == ["0", "1", "2", "3"]
    assert text.index("ldtilecfg") < text.index("tdpbf16ps") < text.index("tilerelease")


def test_the_bfloat16_unit_says_why_it_is_missing_or_is_faster_than_scalar_code() -> None:
    unit = peaks_matrix.matrix_bfloat16()
    if unit is None:
        assert peaks_matrix.amx_unavailable()
        assert not peaks_matrix.HAS_DOT_BF16
        return
    work, flops, _ = unit
    scalar = hardware.rate([peaks.fma_scalar], peaks.FLOPS_SCALAR)
    assert hardware.rate([work], flops) > 4 * scalar


# --- timing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_rate_counts_the_work_of_all_threads(threads) -> None:
    def sleep(iterations: int) -> None:
        time.sleep(0.002 * iterations)

    found = hardware.rate([sleep] * threads, 10.0, seconds=0.02, runs=3)
    assert 0.5 * 5_000 * threads < found <= 5_000 * threads  # 10 units in 2 ms, never more


def test_a_first_try_that_is_interrupted_does_not_pass_for_long_work(monkeypatch) -> None:
    found: list[int] = []
    interruptions = iter([0.005])

    def timed(work, iterations: int) -> float:
        return next(interruptions, 0.0) + 1e-5 * iterations

    monkeypatch.setattr(hardware, "_timed", timed)
    monkeypatch.setattr(hardware, "together", lambda works, iterations, runs: found.append(iterations) or 1.0)
    hardware.rate([lambda iterations: None], 1.0)
    assert found == [200]  # fill 2 ms


@pytest.mark.parametrize(("seconds", "asked", "done"), [(1e-4, 2, 2), (0.15, 9, 3), (0.015, 9, 5)])
def test_long_runs_are_fewer_and_at_least_three(seconds, asked, done, monkeypatch) -> None:
    found = []
    monkeypatch.setattr(hardware, "_timed", lambda work, iterations: seconds * iterations)
    monkeypatch.setattr(hardware, "together", lambda works, iterations, runs: found.append(runs) or 1.0)
    hardware.rate([lambda iterations: None], 1.0, runs=asked)
    assert found == [done]


def test_bandwidth_in_cache_is_above_that_of_memory_and_below_what_registers_allow() -> None:
    found = hardware.bandwidths(1, [32 * 1024, 128 * 2**20], runs=5)
    registers = hardware.rate([peaks.fma32], peaks.FLOPS_FMA32) / 2 * 4
    assert found["read"][0] > 1.5 * found["read"][1]
    assert found["copy"][0] > 1.5 * found["copy"][1]
    assert found["read"][0] < 2.5 * registers


def test_curves_cover_all_cores_and_start_with_a_share_for_each() -> None:
    cores = usable_cores()
    curves = hardware.curves(cores, largest=2**20)
    assert set(curves) == {"copy_1", "copy_all", "read_1", "read_all"}
    assert curves["copy_1"].working_set_bytes[0] == 16 * 1024
    assert curves["copy_all"].working_set_bytes[0] == 16 * 1024 * (cores if cores > 1 else 1)
    assert all(rate > 1e8 for curve in curves.values() for rate in curve.bytes_per_second)


def test_working_sets_double_and_the_long_ones_are_fewer() -> None:
    assert hardware._sizes(2**14, 2**17) == [2**14, 2**15, 2**16, 2**17]
    assert hardware._sizes(2**24, 2**31) == [2**24, 2**25, 2**26, 2**28, 2**30, 2**31]
    assert hardware._sizes(2**24, 2**30 - 1) == [2**24, 2**25, 2**26, 2**28, 2**29]


def test_page_faults_cost_some_microseconds_at_most_and_leave_no_memory(monkeypatch) -> None:
    hardware.page_faults(usable_cores(), size_bytes=2**24)
    before = psutil.Process().memory_info().rss
    asked: list[int] = []
    monkeypatch.setattr(
        fresh_memory, "in_huge_pages", lambda memory: asked.append(len(memory)) or in_huge_pages(memory)
    )
    figures = hardware.page_faults(usable_cores(), size_bytes=2**26)
    lives = 2 * (1 + 12)  # one thread and all, each once before it is timed
    assert asked == [2**26] * (lives if huge_page_bytes() else 0)
    assert psutil.Process().memory_info().rss - before < 2**25
    for name, (per_byte, source) in figures.items():
        assert 2e-8 < per_byte * peaks.PAGE_BYTES < 1e-4, name
        assert ("huge pages" in source) == name.startswith("huge_page")
    assert ("huge_page_fault_s_per_byte" in figures) == bool(huge_page_bytes())


# --- software --------------------------------------------------------------------------------------


@pytest.mark.alone
def test_calls_cost_more_than_operations_and_each_figure_has_its_source() -> None:
    figures = calibration_calls.python() | calibration_calls.compiled()
    figures |= calibration_calls.threads() | calibration_calls.pickling()
    value = {name: seconds for name, (seconds, _) in figures.items()}
    assert all(seconds >= 0 for seconds in value.values())
    assert all(len(source) > 10 for _, source in figures.values())
    assert value["python_call_s"] > value["python_operation_s"]
    assert value["numpy_call_s"] > value["python_operation_s"]
    assert value["libm_exp_s"] > value["numpy_exp_s"] / 4
    assert value["thread_start_s"] > value["python_call_s"]
    assert 1e-10 < value["python_operation_s"] < 1e-6


def test_compiling_costs_more_than_a_thousand_calls() -> None:
    value = {}
    for part in (calibration_compilers.numba_compiler, calibration_compilers.jax_compiler):
        value |= {name: seconds for name, (seconds, _) in part().items()}
    assert set(value) == {"numba_compile_s", "numba_array_call_s", "jax_first_call_s"}
    call = value.pop("numba_array_call_s")
    assert all(1000 * call < seconds for seconds in value.values())
    assert all(1e-3 < seconds < 60 for seconds in value.values())


@pytest.mark.proof
def test_capturing_costs_more_than_calling_and_compiling_more_than_capturing() -> None:
    value = {}
    for part in (calibration_compilers.torch_capture, calibration_compilers.cxx_compiler):
        value |= {name: seconds for name, (seconds, _) in part().items()}
    assert value["cxx_compile_s"] > value["torch_capture_s"] > 100 * value["torch_compiled_call_s"] > 0


def test_a_compiler_that_fails_or_is_not_there_is_said(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the C\\+\\+ compiler failed on torch's header"):
        calibration_compilers.cxx_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="there is no C\\+\\+ compiler on the path"):
        calibration_compilers.cxx_compiler()


def test_processes_are_measured_in_a_child_that_leaves_none_behind() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    figures = calibration_processes.measure()
    value = {name: seconds for name, (seconds, _) in figures.items()}
    assert value["spawn_s"] > value["fork_s"] > value["process_switch_s"] > 0  # spawn starts an interpreter
    assert 1e-12 < value["pipe_s_per_byte"] < 1e-6
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_links_are_measured_in_ranks_that_leave_nothing_behind() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    value = {name: seconds for name, (seconds, _) in calibration_links.measure().items()}
    for latency, per_byte in (("message", "s_per_byte"), ("exchange", "exchange_s_per_byte")):
        assert 1e-6 < value[f"gloo_{latency}_s"] < 0.1
        assert 0 <= value[f"gloo_{per_byte}"] < 1e-6
    assert 1e-8 < value["torch_woken_call_s"] < value["gloo_exchange_s"]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "late_part did not end within 2 s"),
        ("raise OSError('no pipe')", "late_part failed: OSError: no pipe"),
        ("import os; os._exit(3)", "late_part failed: no message"),
    ],
)
def test_a_child_that_fails_or_does_not_end_is_said(tmp_path, monkeypatch, code, said) -> None:
    (tmp_path / "late_part.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=said):
        calibration_child.figures_of("late_part", 2.0)


def test_facts_are_read_as_the_system_writes_them() -> None:
    assert calibration_facts._cpu_list("0-2,5") == {0, 1, 2, 5}
    assert calibration_facts.memory_bytes() > 2**28
    caches = calibration_facts.caches()
    if {"l1d_bytes", "l2_bytes"} <= set(caches):
        assert caches["l1d_bytes"] < caches["l2_bytes"]
    facts = calibration_facts.facts()
    assert facts["usable_cores"] == usable_cores()
    assert facts["versions"]["numba"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "NVIDIA H200 141GB SXM"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB SXM"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB SXM"),
        ("AMD Instinct MI300X", "AMD Instinct MI300X"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 4060 Laptop GPU (115 W)"),
        ("NVIDIA GeForce RTX 4060", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_device_gets_the_sheet_of_its_own_product(device, name) -> None:
    sheet = sheet_of(device)
    assert (sheet.name if sheet else None) == name


# --- putting it together ---------------------------------------------------------------------------


def test_sweeps_combine_to_the_best_limit_and_the_typical_cost() -> None:
    assert calibration.combine("vector_float32_1_flops", [1.0, 3.0, 2.0]) == 3
    assert calibration.combine("fork_s", [3.0, 1.0, 2.0]) == 2  # a cost: what is typical


def test_a_figure_above_its_ceiling_is_doubted_by_name() -> None:
    machine = plausible_machine()
    assert calibration.doubts(machine) == []
    artefact = Curve((2.0**15, 2.0**26), (1.8e12, 1e10))
    (doubt,) = calibration.doubts(replace(machine, curves={**machine.curves, "read_1": artefact}))
    assert "read bandwidth" in doubt
    fast = {**machine.constants, "scalar_float32_flops": 2e11}
    (doubt,) = calibration.doubts(replace(machine, constants=fast))
    assert "scalar" in doubt


@pytest.mark.alone
def test_recheck_finds_another_machine_and_knows_its_own() -> None:
    machine = plausible_machine()
    unit = replace(
        machine,
        constants={**machine.constants, "vector_float32_1_flops": 1.0, "python_operation_s": 1.0},
        curves={"copy_all": Curve((2.0**25,), (1.0,))},
    )
    speed = calibration.recheck(unit, seconds=0.1)  # against 1 of each unit: the absolute speeds
    assert set(speed) == {"vector_float32_1_flops", "copy_all", "python_operation_s"}
    mine = replace(
        unit,
        constants={
            **machine.constants,
            "vector_float32_1_flops": speed["vector_float32_1_flops"],
            "python_operation_s": 1 / (8 * speed["python_operation_s"]),  # claims to be 8 times as fast
        },
        curves={"copy_all": Curve((2.0**25,), (speed["copy_all"],))},
    )
    ratios = calibration.recheck(mine, seconds=1.0)
    assert ratios["vector_float32_1_flops"] == pytest.approx(1, abs=0.5)
    assert ratios["python_operation_s"] < 0.5


def test_buffers_give_their_memory_back() -> None:
    with hardware.Buffer(2**20) as buffer:
        assert buffer.floats.nbytes == 2**20
        assert buffer.floats.ctypes.data % 4096 == 0
    assert buffer.memory.closed


def test_together_reports_a_worker_that_fails() -> None:
    def fail(iterations: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="calibration thread"):
        hardware.together([fail, partial(time.sleep)], 0)


@pytest.mark.proof
def test_a_whole_calibration_takes_less_than_20_seconds_and_is_plausible(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    start = time.perf_counter()
    machine, message = calibration.current(force=True)
    assert time.perf_counter() - start < 20
    assert "on request" in message
    assert set(machine.constants) <= set(machine.sources)
    assert machine.facts.get("doubts", []) == []
    assert machine["vector_float32_1_flops"] > 3 * machine["scalar_float32_flops"]
    again, message = calibration.current()
    assert again.measured_at == machine.measured_at, "it is minutes old: kept, whatever the anchors say"
    assert "hold: anchors within" in message or "changing by the minute" in message
