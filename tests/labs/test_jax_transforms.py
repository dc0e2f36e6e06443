"""The lab on JAX's transformations: every way against float64, what programs were compiled to, its claims."""

import inspect
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_cache import kept_in
from stated import Stated, machine

from labs import figure as figures
from labs.jax_transforms import (
    LAB,
    arrays,
    claims,
    costs,
    derivatives,
    excerpts,
    misuse,
    networks,
    proof,
    recurrent,
    retracing,
    sharded_program,
    sharding,
    training,
)
from labs.lab import configure, find

pytestmark = pytest.mark.usefixtures("kept_by_jax")
SIZES = dict(
    products=5, samples=3, features=6, width=8, batch=5, steps=9, hidden=5, inputs=3, outputs=7, parameters=4,
    side=16, lengths=3, devices=4, compile=False,
)  # fmt: skip
SMALL = configure(LAB, "quick", SIZES)
IN_A_WORLD = sharding.DTENSOR
ADDRESSES = [variant.address for variant in LAB.variants(SMALL)]
HERE = [each for each in ADDRESSES if each not in (IN_A_WORLD, sharding.SHARD_MAP, misuse.VARIANT)]
CONSTANTS = dict(
    jax_call_s=4e-6, jax_array_s=2e-6, jax_handover_s=10e-6, jax_wait_s=20e-6, jax_wake_s=40e-6,
    thread_switch_s=10e-6, jax_eager_call_s=5e-6,
    jax_recorded_call_s=200e-6,
    jax_kernel_s=0.3e-6, jax_compile_s=50e-3, jax_compile_kernel_s=5e-3, jax_matmul_flops=200e9,
    torch_recorded_call_s=4e-6, torch_func_call_s=15e-6, torch_backward_s=10e-6,
    torch_func_entry_s=30e-6, torch_compiled_array_s=5e-6, numpy_exp_s=0.3e-9,
    scalar_float32_flops=15e9, jax_first_call_s=30e-3, torch_compiled_gradient_s=60e-6,
    torch_compiled_call_s=15e-6, torch_product_call_s=1e-6,
)  # fmt: skip
MACHINE = machine(**CONSTANTS)


class Notes:
    """A recorder that keeps the last value of each name."""

    def __init__(self):
        self.values, self.texts = {}, {}

    def now(self):
        return 0.0

    def record(self, name, value, unit):
        self.values[f"{name}_{unit}" if unit else name] = value

    def text(self, title, text):
        self.texts[title] = text


def made(address, config=SMALL):
    """(what the step returned, what was recorded)."""
    notes = Notes()
    step = find(LAB, config, address).setup(config, notes)
    output = step()
    getattr(step, "close", lambda: None)()
    return output, notes.values


# --- references and structures ---------------------------------------------------------------------


def test_a_list_of_turns_is_the_structure_with_turns_as_first_axis():
    first, second = np.arange(6.0).reshape(2, 3), np.arange(2.0)
    loop = [(row, number) for row, number in zip(first, second, strict=True)]
    assert all(a.tolist() == b.tolist() for a, b in zip(arrays.leaves(loop), (first, second), strict=True))
    assert arrays.vector((first, second)).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_the_gradient_by_hand_is_that_of_autograd(inputs, layers, count):
    import torch

    sizes = networks.widths(inputs, layers)
    weights = [torch.tensor(each).double().requires_grad_() for each in networks.parameters(sizes)]
    x, y = (torch.tensor(each).double() for each in networks.batch(sizes, count))
    value = networks.loss(torch.tanh, weights, x, y)
    mine, slopes = networks.gradient([each.detach().numpy() for each in weights], x.numpy(), y.numpy())
    assert mine == pytest.approx(value.item(), rel=1e-12)
    for slope, other in zip(slopes, torch.autograd.grad(value, weights), strict=True):
        np.testing.assert_allclose(slope, other.numpy(), rtol=1e-9, atol=1e-12)


def test_references_of_derivatives_are_those_of_autograd():
    import torch
    from torch.autograd.functional import hessian, jacobian

    first, second, x = (torch.tensor(each).double() for each in derivatives.function_inputs(SMALL))
    rows, point = (torch.tensor(each).double() for each in derivatives.regression_inputs(SMALL))
    found = jacobian(lambda x: torch.tanh(second @ torch.tanh(first @ x)), x)
    np.testing.assert_allclose(derivatives.jacobian_reference(SMALL, ""), found, rtol=1e-9, atol=1e-12)
    found = hessian(lambda x: torch.nn.functional.softplus(rows @ x, threshold=1e9).sum(), point)
    np.testing.assert_allclose(derivatives.hessian_reference(SMALL, ""), found, rtol=1e-9, atol=1e-12)
    sequence, state, *weights = (torch.tensor(each).double() for each in recurrent.inputs(SMALL))
    recurrent_weight, incoming = (each.requires_grad_() for each in weights)
    for row in sequence:
        state = torch.tanh(state @ recurrent_weight + row @ incoming)
    np.testing.assert_allclose(recurrent.reference(SMALL, ""), state.detach(), rtol=1e-9, atol=1e-12)
    slopes = torch.autograd.grad((state**2).mean(), weights)
    for mine, other in zip(recurrent.gradient_reference(SMALL, ""), slopes, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)


def test_flops_by_formula_are_those_that_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sizes = training.sizes(SMALL)
    weights = [torch.tensor(each).requires_grad_() for each in networks.parameters(sizes)]
    x, y = (torch.tensor(each) for each in networks.batch(sizes, 5))
    with FlopCounterMode(display=False) as counter:
        value = networks.loss(torch.tanh, weights, x, y)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(value, weights)
    assert forward == networks.product_flops(sizes, 5)
    assert forward + counter.get_total_flops() == networks.gradient_flops(sizes, 5)


# --- every way ----------------------------------------------------------------------------------------


def changed(output, by):
    """The output with ``by`` added to one number of its last leaf."""
    if isinstance(output, (list, tuple)):
        return type(output)([*output[:-1], changed(output[-1], by)])
    found = arrays.leaves(output)[0].copy()
    found.reshape(-1)[-1] += by
    return found


IN_SHORT = (
    "dispatch/inline_7x7", "batched_products/vmap", "batched_products/torch_vmap", "sample_gradients/vmap",
    "training_step/step", "training_step/torch", "recurrent/scan", "recurrent/torch",
    "recurrent_gradient/checkpoint", "jacobian/forward", "jacobian/torch_loop",
    "hessian/forward_over_reverse", "softmax/pallas_interpret", "retracing/padded",
)  # fmt: skip


@pytest.mark.parametrize(
    "address", [pytest.param(each, marks=() if each in IN_SHORT else pytest.mark.proof) for each in HERE]
)
def test_every_way_computes_the_same_and_a_wrong_number_is_found(address):
    output, recorded = made(address)
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed, found
    assert found.tolerance < 1e-4
    largest = np.abs(arrays.leaves(output)[-1]).max()
    wrong = changed(output, 3 * found.tolerance * max(largest, 1e-3))
    assert not LAB.check(SMALL, {address: wrong})[0].passed
    assert not LAB.check(SMALL, {address: changed(output, math.nan)})[0].passed
    with pytest.raises(TypeError, match="returned arrays of shapes"):
        LAB.check(SMALL, {address: (output, output)})
    if "compile_s" in recorded:
        assert recorded["xla_FLOP"] > 0
        assert recorded["output_B"] >= 4 * sum(leaf.size for leaf in arrays.leaves(output))


def test_a_donated_step_goes_on_from_its_own_result():
    """Two steps are two steps of gradient descent, though the first one's parameters are gone."""
    step = find(LAB, SMALL, "training_step/donated").setup(SMALL, Notes())
    first = arrays.vector(step())
    second = arrays.vector(step())
    weights = [each.astype(float) for each in networks.parameters(training.sizes(SMALL))]
    batch = networks.batch(training.sizes(SMALL), SMALL.batch)
    for got in (first, second):
        value, slopes = networks.gradient(weights, *batch)
        weights = [weight - networks.RATE * slope for weight, slope in zip(weights, slopes, strict=True)]
        np.testing.assert_allclose(got, arrays.vector((value, *weights)), rtol=1e-4, atol=1e-6)


def test_programs_say_what_the_lab_claims_of_them():
    """scan compiles one step; checkpoint saves memory in it and nothing outside; donation reuses all."""
    config = replace(SMALL, steps=24, hidden=16, width=32)
    short = replace(config, steps=12)  # to compile steps one by one takes seconds
    scan, unrolled = (made(f"recurrent/{name}", short)[1] for name in ("scan", "unrolled"))
    longer = made("recurrent/scan", config)[1]
    assert longer["kernels"] == scan["kernels"] < unrolled["kernels"] / 4
    assert scan["kernels"] > 0
    assert scan["xla_FLOP"] * short.steps == pytest.approx(unrolled["xla_FLOP"], rel=0.01)
    kept, again = (made(f"recurrent_gradient/{name}", config)[1] for name in ("scan", "checkpoint"))
    assert again["temporary_B"] < 0.7 * kept["temporary_B"]
    assert again["xla_FLOP"] > 1.1 * kept["xla_FLOP"]
    plain, checkpoint, donated = (
        made(f"training_step/{name}", config)[1] for name in ("step", "checkpoint", "donated")
    )
    assert checkpoint["xla_FLOP"] <= 1.05 * plain["xla_FLOP"]
    assert plain["reused_B"] == 0
    assert donated["reused_B"] == 4 * networks.number_of_parameters(training.sizes(config))
    assert donated["temporary_B"] > plain["temporary_B"]


@pytest.mark.parametrize(("name", "traces"), [("every_length", SMALL.lengths), ("padded", 1)])
def test_each_shape_is_traced_once(name, traces):
    assert made(f"{retracing.GROUP}/{name}")[1]["traces"] == traces


# --- over devices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over_four():
    return made(sharding.SHARD_MAP)


def test_each_layout_has_its_collectives(over_four):
    output, recorded = over_four
    assert LAB.check(SMALL, {sharding.SHARD_MAP: output})[0].passed
    assert recorded == claims._collectives(None)


def test_collectives_are_read_from_the_program():
    found = sharded_program.collectives(
        "%a = f32[4,6]{1,0} all-gather(%x), channel_id=1\n%b = f32[] all-reduce(%y)\n%c = f32[2] add(%x, %y)"
    )
    assert (found["kinds"], found["bytes"]) == (["all-gather", "all-reduce"], 4 * 24 + 4)
    assert found["lines"][1] == "%b = f32[] all-reduce(%y)"


def test_a_silent_child_is_ended_and_named():
    with pytest.raises(TimeoutError, match=r"waited 0.05 s for its child process with 3 JAX host devices"):
        sharding.over_devices(3, 0.05)


def test_a_child_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "nonsense")
    with pytest.raises(RuntimeError, match=r"the child process with 2 JAX host devices failed: .*nonsense"):
        sharding.over_devices(2)


def test_the_error_of_a_child_is_told_and_not_the_remark_behind_it():
    said = "Traceback:\n  x\njax.errors.TracerError: what was wrong\n----\nFor simplicity, JAX has removed"
    assert sharding.error(said) == "jax.errors.TracerError: what was wrong"
    assert sharding.error("Segmentation fault\n") == "Segmentation fault"
    assert sharding.error("") == "no message"


RANK = """
import torch.distributed as dist
from labs.jax_transforms import LAB, sharding
from labs.lab import configure, find

class Counted:
    def record(self, name, value, unit):
        print(name, value, flush=True)

dist.init_process_group("gloo")
config = configure(LAB, "quick")
output = find(LAB, config, sharding.DTENSOR).setup(config, Counted())()
print("passed", LAB.check(config, {sharding.DTENSOR: output})[0].passed, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.proof
def test_dtensor_needs_the_same_collective(tmp_path):
    """Of two ranks: where one has all, none is needed."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == sorted(["rows_collectives", "1", "passed", "True"] * 2)


# --- predictions, claims, figures ------------------------------------------------------------------


def test_every_time_is_predicted_with_its_numbers_and_a_suspect():
    config = configure(LAB, "quick")
    said = [each for each in LAB.predict(config, MACHINE) if each.key == "time_s"]
    named = {each.address for each in LAB.variants(config)}
    assert {each.variant for each in said} == named - {misuse.VARIANT, sharding.SHARD_MAP, sharding.DTENSOR}
    for each in said:
        assert 0 < each.value < 10
        assert each.because
        assert each.suspect


def test_costs_by_hand():
    assert costs.jitted_call(MACHINE, 1, 999) == pytest.approx(4e-6)
    assert costs.jitted_call(MACHINE, 2.5) == pytest.approx(4e-6 + 1.5 * 2e-6 + 40e-6)
    assert costs.streamed_call(MACHINE, 1, 1e-6) == pytest.approx(4e-6 + 10e-6)  # a call, and handing it over
    assert costs.streamed_call(MACHINE, 11, 1e-6) == pytest.approx(24e-6 + 10e-6)
    assert costs.streamed_call(MACHINE, 1, 50e-6) == pytest.approx(50e-6)  # XLA's thread is the slower one
    assert costs.program(MACHINE, 20e9, 1, 10) == pytest.approx(
        0.1 + 3e-6 + 20e-6
    )  # a large product is shared
    assert costs.program(MACHINE, 6e6, 6, 0) == pytest.approx(2 * 30e-6)  # small ones have one of two cores
    assert costs.torch_program(MACHINE, 9e9, 5, "recorded", products=1) == pytest.approx(0.09 + 30e-6)
    assert costs.torch_program(MACHINE, 9e9, 5, products=1, threads=1) == pytest.approx(0.18 + 5e-6)
    said = {(each.variant, each.key): each.value for each in LAB.predict(SMALL, MACHINE)}
    assert said["recurrent/unrolled", "compile_s"] == pytest.approx(50e-3 + (SMALL.steps + 6) * 5e-3)
    assert said["retracing/every_length", "traces"] == SMALL.lengths


def test_the_gradient_is_three_forward_passes_less_that_of_the_data():
    assert networks.product_flops([4, 4, 10], 1) == 2 * (16 + 40)
    assert networks.gradient_flops([4, 4, 10], 1) == 3 * 2 * (16 + 40) - 2 * 16


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"side": 20}, "no multiple of 8"),
        ({"outputs": 3}, "no more than inputs=3"),
        ({"steps": 2}, "minimum"),
        ({"width": 100_000}, "maximum"),
        ({"devices": 3}, "devices=3 do not divide the 64 rows"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        configure(LAB, "quick", {**SIZES, **wrong})


@pytest.mark.parametrize(
    ("large", "least"),
    [({"width": 16384}, 100e9), ({"batch": 65536, "width": 4096}, 50e9), ({"side": 32768}, 60e9)],
)
def test_memory_of_large_sizes_is_counted(large, least):
    assert LAB.memory_bytes(configure(LAB, "quick")) < 2e9
    assert LAB.memory_bytes(configure(LAB, "quick", large)) > least


def test_one_core_has_no_cost_of_a_parallel_region():
    one = replace(MACHINE, constants={k: v for k, v in MACHINE.constants.items() if "region" not in k})
    assert LAB.predict(SMALL, one)


def predicted_results(times=None, values=None):
    """Everything comes out as predicted, and what is counted as claimed."""
    config = configure(LAB, "quick")
    said = LAB.predict(config, MACHINE)
    columns = {each.variant: each.value for each in said if each.key == "time_s"}
    columns |= dict.fromkeys((misuse.VARIANT, IN_A_WORLD, sharding.SHARD_MAP), 1.0)
    counted = {(each.variant, each.key): each.value for each in said if each.key != "time_s"}
    counted |= {(misuse.VARIANT, f"{name}_caught"): 1.0 for name in misuse.CASES}
    counted |= {
        ("training_step/checkpoint", "xla_FLOP"): counted["training_step/step", "xla_FLOP"],
        ("recurrent_gradient/scan", "xla_FLOP"): 100.0,
        ("recurrent_gradient/checkpoint", "xla_FLOP"): 140.0,
        ("recurrent_gradient/scan", "temporary_B"): 100.0,
        ("recurrent_gradient/checkpoint", "temporary_B"): 40.0,
        ("recurrent/scan", "kernels"): 6.0,
        ("recurrent/unrolled", "kernels"): 256.0,
        ("recurrent/scan", "xla_FLOP"): 100.0,
        ("recurrent/unrolled", "xla_FLOP"): 100.0 * config.steps,
        ("training_step/step", "temporary_B"): 2e5,
        ("training_step/step", "output_B"): 8e5,
        ("training_step/donated", "temporary_B"): 8e5,
        ("training_step/donated", "output_B"): counted["training_step/donated", "reused_B"],
    }
    return Stated(
        config, MACHINE, {"tuned": columns | (times or {})}, "tuned", values=counted | (values or {})
    )


def test_all_claims_hold_when_the_predictions_come_true():
    results = predicted_results()
    verdicts = {claim.text: claim.holds(results) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


REFUTED = [
    {"times": {"dispatch/handed_over_8x8": 1e-6}},
    {"times": {"batched_products/vmap": 1.0}},
    {"times": {"sample_gradients/vmap": 1.0}},
    {"times": {"training_step/gradient": 1.0}},
    {"times": {"training_step/eager": 1e-9}},
    {"values": {("training_step/donated", "reused_B"): 4.0}},
    {"values": {("training_step/donated", "temporary_B"): 2e6}},
    {"values": {("training_step/checkpoint", "xla_FLOP"): 1e12}},
    {"values": {("recurrent_gradient/checkpoint", "temporary_B"): 90.0}},
    {"values": {("recurrent/unrolled", "kernels"): 7.0}},
    {"values": {("recurrent/scan", "xla_FLOP"): 6400.0}},
    {"times": {"recurrent/unrolled": 1e-9}},
    {"times": {"recurrent/loop": 1e-9}},
    {"times": {"jacobian/forward": 1.0}},
    {"times": {"hessian/forward_over_reverse": 1.0}},
    {"times": {"softmax/pallas_interpret": 1e-9}},
    {"values": {("retracing/padded", "traces"): 2.0}},
    {"values": {(sharding.DTENSOR, "rows_collectives"): 2.0}},
    {"values": {(misuse.VARIANT, "branch_caught"): 0.0}},
]


@pytest.mark.parametrize(("claim", "other"), list(zip(LAB.claims, REFUTED, strict=True)), ids=lambda each: "")
def test_each_claim_can_fail(claim, other):
    assert claim.holds(predicted_results(**other)) is False


def test_nothing_measured_decides_nothing():
    nothing = Stated(configure(LAB, "quick"), MACHINE, {})
    assert {claim.holds(nothing) for claim in LAB.claims} == {None}
    assert LAB.figure(nothing) == []


def test_figures_carry_their_numbers_and_survive_json():
    drawn = LAB.figure(predicted_results())
    assert len(drawn) == 11
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('jax_transforms');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


# --- excerpts -----------------------------------------------------------------------------------------


def texts(address, config=SMALL):
    notes = Notes()
    step = find(LAB, config, address).setup(config, notes)
    step()
    getattr(step, "close", lambda: None)()
    for title, text in notes.texts.items():
        assert title
        assert text.strip()
        assert "(no " not in text.replace("(no collective)", "")
        assert max(map(len, text.splitlines())) <= 4 * excerpts.WIDTH
    return notes.texts


def test_excerpts_show_what_they_explain():
    (scan,), (unrolled,) = (texts(f"recurrent/{name}").values() for name in ("scan", "unrolled"))
    assert "stablehlo.while" in scan
    assert "stablehlo.while" not in unrolled
    assert f"and {2 * SMALL.steps - 4} more such lines" in unrolled
    (batched,) = texts("batched_products/vmap").values()
    assert "batch_dims={0}" in batched


def test_barriers_of_a_checkpoint_are_there_before_xla_and_gone_after_it():
    plain, again = (
        [list(map(int, row.split()[1:])) for row in text.splitlines()[-2:]]
        for name in ("step", "checkpoint")
        for text in texts(f"training_step/{name}").values()
    )
    assert again[0][0] > plain[0][0]
    assert again[1] == [plain[1][0], 0]
    assert again[0][1] > 0


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("training_step/donated", 1),
        ("softmax/pallas_interpret", 1),
        (sharding.SHARD_MAP, len(sharding.EXPECTED)),
        (misuse.VARIANT, len(misuse.CASES)),
    ],
)
def test_programs_and_messages_are_shown_once(address, count):
    assert len(texts(address)) == count


def test_every_group_has_its_reference():
    assert set(proof.REFERENCES) == {each.partition("/")[0] for each in ADDRESSES} - {"misuse"}
    assert all(len(inspect.signature(each).parameters) == 2 for each, _ in proof.REFERENCES.values())


# --- the constants that predictions are made of ------------------------------------------------------


@pytest.mark.alone
def test_constants_of_programs_are_above_nothing_and_in_their_order():
    from labs import calibration_calls, calibration_transforms

    with kept_in(None):
        programs = calibration_transforms.jax_programs() | calibration_transforms.torch_programs()
        calls = calibration_calls.jax_calls() | calibration_calls.torch_calls()
    assert not set(programs) & set(calls)  # a constant has one meaning
    value = {name: found for name, (found, _) in (programs | calls).items() if name in CONSTANTS}
    elsewhere = {"numpy_exp_s", "scalar_float32_flops", "thread_switch_s", "jax_first_call_s"}
    elsewhere |= {f"torch_compiled_{what}_s" for what in ("gradient", "array", "call")}
    assert set(CONSTANTS) - elsewhere == set(value)
    assert all(found >= 0 for found in value.values())
    assert all(len(source) > 10 for _, source in (programs | calls).values())
    assert value["jax_recorded_call_s"] > value["jax_eager_call_s"] > 1e-7
    assert value["torch_func_call_s"] > value["torch_recorded_call_s"] > 1e-7
    assert value["jax_compile_s"] > value["jax_recorded_call_s"]
    assert 1e8 < value["jax_matmul_flops"] < 1e15
