"""The lab of programming models: every way against float64, what each refuses, its counts and claims."""

import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from stated import Stated, machine

from labs import figure as figures
from labs.lab import Interval, configure, find
from labs.programming_models import (
    LAB,
    behaviours,
    chain,
    claims,
    costs,
    expected,
    gpt_block,
    payback,
    proof,
    rnn,
    torch_ways,
    training_step,
)
from labs.programming_models.refusals import Refused, refusal

pytestmark = pytest.mark.usefixtures("kept_by_jax")
SMALL = configure(
    LAB, "quick", {"elements": 2**18, "batch": 3, "width": 8, "steps": 4, "tokens": 5, "shapes": 9}
)
# Inductor's ways compile C++; JAX compiles each operation of a network by itself where it is eager.
SLOW = ("torch_compile", "torch_cell")
SLOW_ADDRESSES = ("training_step/jax", "gpt_block/jax", "rnn_loop/numba")


@dataclass
class Kept:
    """A recorder that keeps what it is given."""

    values: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def now(self) -> float:
        return time.perf_counter()

    def record(self, name: str, value: float, unit: str) -> None:
        self.values[f"{name}_{unit}" if unit else name] = value

    def text(self, title: str, text: str) -> None:
        self.texts[title] = text


def ran(address: str) -> tuple[object, Kept]:
    """Output of one call of a way, and what it recorded until it was closed."""
    kept = Kept()
    step = find(LAB, SMALL, address).setup(SMALL, kept)
    output = step()
    getattr(step, "close", lambda: None)()
    return output, kept


def networks() -> list[Any]:
    """Ways of the chain (of one length beside the longest) and of the networks."""
    found = []
    for each in LAB.variants(SMALL):
        if each.unavailable or each.max_rounds == 1 or each.group in ("chain_16384", "chain_65536"):
            continue
        slow = each.name in SLOW or each.address in SLOW_ADDRESSES
        marks = [pytest.mark.proof] if slow else [pytest.mark.gpu] if each.name in chain.CUDA else []
        found.append(pytest.param(each.address, marks=marks))
    return found


PROGRAMS = [each.address for each in LAB.variants(SMALL) if each.max_rounds == 1 and not each.unavailable]


# --- the ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", networks())
def test_every_way_computes_the_same_and_a_wrong_element_is_found(address: str) -> None:
    output, kept = ran(address)
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed, found
    parts = [part for part in output] if isinstance(output, list) else [output]
    for factor in (1 + 4 * found.tolerance, math.nan):
        wrong = [part * factor for part in parts]
        assert not LAB.check(SMALL, {address: wrong if len(wrong) > 1 else wrong[0]})[0].passed
    assert LAB.check(SMALL, {address: []})[0].error == math.inf
    if address.endswith(("jit", "scan", "compile", "cell")) or address.endswith("8/numba"):
        assert kept.values["compile_s"] > 0
        graphs = 1  # the cell's state is another tensor from the second step on, and no other program
        assert kept.values["graphs"] == graphs


@pytest.mark.parametrize(
    ("address", "title", "words"),
    [
        ("chain_262144/fx", "FX graph as Python", ("def forward(self, x", "* 0.75")),
        ("chain_262144/torch_export", "exported program", ("aten.mul.Tensor", "aten.add.Tensor")),
        ("chain_262144/jax_jit", "jaxpr", ("lambda", "mul", "add")),
        ("chain_262144/jax_jit", "optimized HLO of XLA", ("fusion", "f32[262144]")),
        ("chain_262144/numba", "compiled for", ("float32",)),
        ("rnn_loop/jax_scan", "jaxpr", ("scan",)),
        pytest.param(
            "chain_262144/torch_compile", "captured FX graph", ("def forward",), marks=pytest.mark.proof
        ),
        pytest.param(
            "chain_262144/torch_compile", "generated C++", ('extern "C"', "for("), marks=pytest.mark.proof
        ),
    ],
)
def test_captured_programs_are_kept(address: str, title: str, words: tuple[str, ...]) -> None:
    _, kept = ran(address)
    for word in words:
        assert word in kept.texts[title]
    assert os.path.sep.join(("", "labs", "")) not in kept.texts[title]


@pytest.mark.parametrize(
    "address",
    [
        "training_step/jax_jit",
        "gpt_block/jax_jit",
        pytest.param("training_step/torch_compile", marks=pytest.mark.proof),
        pytest.param("gpt_block/torch_compile", marks=pytest.mark.proof),
    ],
)
def test_kernels_that_a_compiler_leaves_are_those_predicted(address: str) -> None:
    config, kept = configure(LAB, "quick"), Kept()
    step = find(LAB, config, address).setup(config, kept)
    step()
    step.close()
    (said,) = [
        each
        for each in LAB.predict(config, machine(**CONSTANTS))
        if (each.variant, each.key) == (address, "kernels")
    ]
    assert kept.values["kernels"] == said.value


def test_a_program_is_shown_at_one_length_only() -> None:
    assert ran("chain_256/fx")[1].texts == {}


# --- branch, side effect, selection, new shapes ----------------------------------------------------------


@pytest.mark.parametrize("address", PROGRAMS)
def test_each_way_does_what_is_predicted_of_it(address: str) -> None:
    output, kept = ran(address)
    program, _, way = address.partition("/")
    for key, value in expected.expected(SMALL)[program, way].items():
        assert kept.values[key] == value, key
    if isinstance(output, Refused):
        assert LAB.check(SMALL, {address: output}) == []
        said = kept.texts["refused"]
        assert said == str(output)
        assert said.startswith(f"{way}: ")
        assert ". Instead: " in said
        assert "\n" not in said
        return
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed
    assert not LAB.check(SMALL, {address: [part + 1 for part in output]})[0].passed
    lost = expected.expected(SMALL)[program, way].get("effects", 3) < 3
    assert ("silently different" in kept.texts) == lost


@pytest.mark.parametrize(
    ("address", "could_not", "instead"),
    [
        ("branch/jax_jit", "a Python `if` has no value to decide by", "jax.lax.cond"),
        ("branch/torch_fullgraph", "may not leave the graph", "torch.cond"),
        ("branch/torch_export", "a Python `if` on a value would make two", "torch.cond"),
        ("branch/fx", "a proxy has no value to branch on", "torch.where"),
        ("selection/jax_jit", "how many elements a mask selects depends on values", "size=..."),
        ("side_effect/numba", "a list that grows", "return what should be kept"),
        ("new_shapes/torch_export", "exported for one shape", "Dim.DYNAMIC"),
    ],
)
def test_a_refusal_says_what_was_wrong_and_what_would_be_right(
    address: str, could_not: str, instead: str
) -> None:
    _, kept = ran(address)
    wrong, _, right = kept.texts["refused"].partition(". Instead: ")
    assert could_not in wrong
    assert instead in right


def test_an_unknown_error_is_quoted_in_one_line() -> None:
    error = refusal("a_way", RuntimeError("\n\nthe first line\nthe second"))
    assert str(error) == "a_way: RuntimeError: the first line"


def test_a_graph_break_is_shown_with_its_reason_and_place() -> None:
    _, kept = ran("branch/torch_compile")
    said = kept.texts["graph breaks and their reasons"]
    assert said.startswith("2 graphs, 1 breaks on the way of this input")
    assert "break: Python branches on the value of a tensor" in said
    assert "`if x.sum() > 0:`" in said
    assert said.count("def forward") == 2


def test_a_guard_on_what_the_function_changes_compiles_again_at_each_call() -> None:
    _, kept = ran("side_effect/torch_compile")
    assert kept.values["graphs"] == 3
    assert kept.texts["compiled again"].startswith("torch_compile: 3 programs for 3 calls.")


def test_recompilations_of_one_way_do_not_count_for_another() -> None:
    for _ in range(2):  # a second time in the same process
        assert ran("new_shapes/torch_static")[1].values["graphs"] == behaviours.RECOMPILE_LIMIT
        assert ran("new_shapes/torch_compile")[1].values["graphs"] == 2  # which length changes is forgotten


# --- one thread, a cache of its own ----------------------------------------------------------------------


def test_threads_are_as_before_whoever_ends_first() -> None:
    import torch

    before = torch.get_num_threads()
    steps = [torch_ways.Eager(lambda: None, ()) for _ in range(2)]
    assert torch.get_num_threads() == 1
    for step in steps:
        step.close()
    assert torch.get_num_threads() == before


def test_the_compiler_cache_is_an_own_folder_for_as_long_as_it_compiles(monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    with torch_ways.own_cache() as folder:
        assert folder.is_dir()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(folder))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere"
    assert not folder.exists()


# --- the model -------------------------------------------------------------------------------------------


def dispatched(step) -> tuple[list[str], float]:
    """Names of the ATen operations of a call, and the numbers in all their operands and results."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names, numbers = [], 0.0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal numbers
            names.append(function.__name__)
            result = function(*args, **(kwargs or {}))
            numbers += sum(each.numel() for each in (*args, result) if isinstance(each, torch.Tensor))
            return result

    with Counting():
        step()
    return names, numbers


def modules_called(module, x) -> int:
    """Calls of modules in a call of this one, itself among them."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    called = []
    hook = register_module_forward_pre_hook(lambda module, arguments: called.append(module))
    try:
        module(x)
    finally:
        hook.remove()
    return len(called)


def test_calls_and_arrays_of_the_chain_are_those_that_torch_makes() -> None:
    step = find(LAB, SMALL, "chain_256/torch").setup(SMALL, Kept())
    names, numbers = dispatched(step)
    step.close()
    assert len(names) == chain.OPERATIONS
    assert numbers == chain.EAGER_ARRAYS * 256


def test_calls_of_the_networks_are_those_that_torch_makes() -> None:
    counts = {}
    for group in ("gpt_block", "training_step"):
        step = find(LAB, SMALL, f"{group}/torch").setup(SMALL, Kept())
        counts[group], _ = dispatched(step)
        step.close()
    products = [name for name in counts["gpt_block"] if name.startswith(("addmm", "mm"))]
    assert len(products) == gpt_block.PRODUCTS
    assert len(counts["gpt_block"]) == gpt_block.CALLS
    assert modules_called(gpt_block.block(SMALL), gpt_block.states(SMALL)) == gpt_block.MODULES
    products = [name for name in counts["training_step"] if name.startswith("mm")]
    assert len(products) == training_step.LOSS_PRODUCTS
    once = 2 * training_step.LOSS_CALLS + 2  # each there and back; detach, and the update of all parameters
    assert len(counts["training_step"]) == once + training_step.BACKWARD_CALLS


def test_products_are_predicted_as_often_as_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product's call is in the library's rate; of the loop's steps the first has none."""
    one = machine(torch_call_s=1.0, torch_recorded_call_s=2.0, torch_backward_s=0.0)
    monkeypatch.setattr(costs, "computing", lambda *arguments: (0.0, ""))
    counted = 2 * training_step.LOSS_CALLS + training_step.BACKWARD_CALLS - training_step.LOSS_PRODUCTS
    assert training_step.cost(SMALL, one, "torch").seconds == counted + training_step.UPDATE_CALLS
    free = machine(torch_call_s=0.0, torch_compiled_call_s=0.0)
    monkeypatch.setattr(costs, "computing", lambda *arguments: (6.0, ""))
    for name in ("torch", "torch_cell", "torch_compile"):
        assert rnn.cost(SMALL, free, name).seconds == 6.0


def test_calls_of_the_block_are_those_in_the_jaxpr() -> None:
    import jax
    import jax.numpy as jnp

    p = {key: jnp.asarray(value.numpy()) for key, value in gpt_block.block(SMALL).named_parameters()}
    made = jax.make_jaxpr(lambda p, x: gpt_block.written_out(jnp, p, x))(
        p, jnp.asarray(gpt_block.states(SMALL)[0].numpy())
    )
    assert len(made.eqns) == gpt_block.JAX_CALLS


def counting_arrays() -> tuple[type, Counter[str]]:
    """A subclass of NumPy's array, and what was done with arrays of it: products, reductions, others, and the
    numbers in all operands and results but the products'."""
    import numpy

    made: Counter[str] = Counter()

    def plain(value: Any) -> Any:
        return numpy.asarray(value) if isinstance(value, numpy.ndarray) else value

    class Counting(numpy.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            made[
                "reductions" if method == "reduce" else "products" if ufunc is numpy.matmul else "others"
            ] += 1
            if out is not None:
                options["out"] = tuple(map(plain, out))
            result = numpy.asarray(getattr(ufunc, method)(*map(plain, inputs), **options)).view(Counting)
            if ufunc is not numpy.matmul:
                made["numbers"] += sum(getattr(each, "size", 1) for each in (*inputs, result))
            return result

        def __array_function__(self, function, types, arguments, options):
            made["others"] += 1
            result = function(*map(plain, arguments), **options).view(Counting)
            made["numbers"] += sum(getattr(each, "size", 1) for each in (*arguments, result))
            return result

        def reshape(self, *shape):
            made["others"] += 1
            return super().reshape(*shape)

        def swapaxes(self, *axes):
            made["others"] += 1
            return super().swapaxes(*axes)

        @property
        def T(self):
            made["others"] += 1
            return self.transpose()

    return Counting, made


def test_calls_of_the_networks_are_those_that_numpy_makes() -> None:
    import numpy

    kind, made = counting_arrays()

    config = configure(
        LAB, "quick", {"batch": 128, "width": 256, "tokens": 64}
    )  # where vectors are few numbers

    def counted(numbers: float) -> tuple[int, ...]:
        found = made["products"], made["reductions"], made["others"]
        assert made["numbers"] == pytest.approx(numbers, rel=0.03)
        made.clear()
        return found

    values, batch = ([each.view(kind) for each in part(config)] for part in (
        training_step.parameters, training_step.examples
    ))  # fmt: skip
    training_step.by_hand(values, *batch)
    assert counted(training_step.numpy_numbers(config)) == training_step.NUMPY
    p = {key: value.numpy().view(kind) for key, value in gpt_block.block(config).named_parameters()}
    gpt_block.written_out(numpy, p, gpt_block.states(config)[0].numpy().view(kind))
    assert counted(gpt_block.numpy_numbers(config)) == gpt_block.NUMPY


CONSTANTS = {
    "numpy_call_s": 0.5e-6, "numpy_reduction_call_s": 1.5e-6, "numpy_exp_s":
    1e-9, "numba_call_s": 0.2e-6, "numba_array_call_s": 0.5e-6, "libm_exp_s": 3e-9, "numba_compile_s": 0.1,
    "torch_scalar_call_s": 2e-6, "torch_module_call_s": 0.5e-6, "torch_product_call_s": 2e-6,
    "torch_recorded_call_s": 4e-6, "torch_compiled_call_s": 12e-6, "torch_exported_call_s": 40e-6,
    "torch_capture_s": 0.1, "cxx_compile_s": 1.0, "jax_call_s": 4e-6, "jax_wake_s": 40e-6,
    "jax_eager_call_s": 4e-6, "jax_recorded_call_s": 100e-6, "jax_product_call_s": 0.5e-6,
    "jax_eager_array_call_s": 8e-6, "jax_index_call_s": 40e-6, "torch_compiled_gradient_s": 60e-6,
    "jax_first_call_s": 0.04, "jax_scalar_call_s": 6e-6, "torch_backward_s": 10e-6,
    "torch_compiled_array_s": 5e-6, "python_item_s": 5e-9, "jax_matmul_flops": 100e9,
}  # fmt: skip
LATER = configure(LAB, "quick")


def test_every_timed_way_is_predicted_with_its_numbers_and_a_suspect() -> None:
    found = LAB.predict(LATER, machine(**CONSTANTS))
    timed = {each.variant for each in found if each.key == "time_s"}
    assert timed == {
        each.address for each in LAB.variants(LATER) if not each.unavailable and each.max_rounds != 1
    }
    for each in found:
        assert each.because
        assert each.exact or (each.suspect and 0 < each.value < math.inf), each


def test_the_chain_by_hand() -> None:
    here = machine(**CONSTANTS)
    eager, fused = (chain.cost(here, 2**20, name).seconds for name in ("torch", "torch_compile"))
    array = 4.0 * 2**20
    assert eager == pytest.approx(7 * 2e-6 + 5 * 1e-6 + 29 * array / here.bandwidth(3 * array))
    assert fused == pytest.approx(12e-6 + 2 * array / here.bandwidth(2 * array))


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width=10 is not a multiple of 4"):
        configure(LAB, "quick", {"width": 10})


@pytest.mark.parametrize(
    ("large", "least"),
    [
        ({"elements": 2**28}, 25e9),
        ({"batch": 65536, "width": 4096}, 50e9),
        ({"tokens": 4096}, 3e9),  # the scores of each head, and of the reference in float64
    ],
)
def test_memory_of_large_sizes_is_counted(large, least) -> None:
    assert LAB.memory_bytes(configure(LAB, "quick")) < 1.5e9
    assert LAB.memory_bytes(configure(LAB, "quick", large)) > least


# --- derived, claims, figures ----------------------------------------------------------------------------


@dataclass
class Counted(Stated):
    """Stated times, first calls and counts."""

    cold: dict[str, float] = field(default_factory=dict)

    def cold_seconds(self, variant: str) -> float:
        return self.cold.get(variant, 10 * self.times[variant])

    def info(self, variant: str, key: str, default: Any = None) -> Any:
        found = {name: [value] for (address, name), value in self.values.items() if address == variant}
        return found if key == "recorded" and found else default


def come_true(times=None, cold=None, counts=None) -> Counted:
    """Results in which every prediction came true, but for what is stated otherwise."""
    found = LAB.predict(LATER, machine(**CONSTANTS))
    seconds = {each.variant: each.value for each in found if each.key == "time_s"}
    seconds |= {each.variant: 1.0 for each in found if each.exact} | (times or {})
    values = {(each.variant, each.key): each.value for each in found if each.exact}
    values |= {("rnn_loop/jax_jit", "compile_s"): 0.5, ("rnn_loop/jax_scan", "compile_s"): 0.1} | (
        counts or {}
    )
    first = {each.variant: each.value for each in found if each.key == "compile_s"}
    first |= {"chain_256/torch_compile": 1.1}
    return Counted(
        LATER, machine(**CONSTANTS), {"tuned": seconds}, "tuned", values=values, cold=first | (cold or {})
    )


def test_all_claims_hold_when_the_predictions_come_true() -> None:
    verdicts = {claim.text: claim.holds(come_true()) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


LONG = f"chain_{LATER.elements}"


@pytest.mark.parametrize(
    ("claim", "otherwise"),
    [
        (claims.fusing_pays_past_the_cache, {"times": {f"{LONG}/numba": 1.0}}),
        (claims.capturing_is_not_fusing, {"times": {f"{LONG}/fx": 1e-9}}),
        (claims.entering_costs, {"times": {"chain_256/torch_compile": 1e-9}}),
        (claims.a_compiled_call_is_nothing, {"times": {"chain_256/numba": 1.0}}),
        (claims.step_in_one_call, {"times": {"training_step/jax_jit": 1.0}}),
        (claims.loop_inside, {"times": {"rnn_loop/jax_scan": 1.0}}),
        (claims.scan_compiles_once, {"counts": {("rnn_loop/jax_scan", "compile_s"): 9.0}}),
        (claims.cold_says_the_opposite, {"cold": {f"{LONG}/torch_compile": 0.03}}),
        (claims.small_work_never_pays, {"cold": {"chain_256/torch_compile": 1e-9}}),
        (claims.shapes_are_compiled, {"counts": {("new_shapes/jax_jit", "graphs"): 1.0}}),
        (claims.branches, {"counts": {("branch/fx", "refused"): 0.0}}),
        (claims.remedies, {"counts": {("branch/torch_cond", "refused"): 1.0}}),
        (claims.effects_are_lost, {"counts": {("side_effect/jax_jit", "effects"): 3.0}}),
    ],
)
def test_each_claim_can_fail(claim, otherwise) -> None:
    assert {each.holds for each in LAB.claims} >= {claim}
    if claim is claims.small_work_never_pays:
        otherwise["times"] = {"chain_256/torch": 1.0}
    assert claim(come_true(**otherwise)) is False


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim) -> None:
    assert claim.holds(Counted(LATER, machine(**CONSTANTS), {})) is None


def test_the_crossover_is_where_overhead_and_bytes_are_equal() -> None:
    """12 us and 1 ns a number: equal at 12,000 numbers."""
    times = {f"chain_{size}/torch": 12e-6 + 1e-9 * size for size in (2**8, 2**16)}
    found = payback.crossover(come_true(times), "torch")
    assert found.value == pytest.approx(12_000)
    assert found.low < found.value < found.high
    assert payback.crossover(come_true({"chain_65536/torch": 1e-9}), "torch") is None


def test_breakeven_is_the_first_call_over_the_saving_and_infinite_without_one() -> None:
    times = {f"{LONG}/torch": 3e-3, f"{LONG}/torch_compile": 1e-3}
    found = payback.breakeven(
        come_true(times, {f"{LONG}/torch_compile": 1.0}), LATER.elements, "torch_compile"
    )
    assert found.value == pytest.approx(500)
    assert found.low < 500 < found.high
    times[f"{LONG}/torch_compile"] = 4e-3
    found = payback.breakeven(come_true(times), LATER.elements, "torch_compile")
    assert found == Interval(math.inf, math.inf, math.inf)


def test_what_is_derived_was_predicted() -> None:
    predicted = {each.key for each in LAB.predict(LATER, machine(**CONSTANTS)) if not each.variant}
    assert {each.key for each in LAB.derive(come_true())} == predicted


def test_figures_carry_their_numbers_and_survive_json() -> None:
    drawn = LAB.figure(come_true())
    assert len(drawn) == 6
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)
    assert list(drawn[-1].series["counted"])[-3:] == [10.0, 4.0, 1.0]  # jit, padded jit, numba
    assert LAB.figure(Counted(LATER, machine(**CONSTANTS), {}))


def test_a_wrong_number_of_parts_is_no_result() -> None:
    assert proof._error([1.0], [1.0, 2.0]) == math.inf
    assert math.isnan(proof._error([math.nan, 1.0], [1.0, 1.0]))
    assert math.isnan(proof._error([1.0, math.nan, 1.0], [1.0, 1.0, 1.0]))


def test_importing_the_lab_loads_no_heavy_package() -> None:
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('programming_models');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
