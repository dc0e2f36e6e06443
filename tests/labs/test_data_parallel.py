"""The data_parallel lab: exact predictions on real ranks, proofs that can say no, claims that can fail."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import cached_property

import pytest
from stated import GLOO, Stated, decision, machine

from labs import figure as figures
from labs import training_seconds
from labs.data_parallel import LAB, claims, model, proof, straggling, ways
from labs.data_parallel.training import batches, build, gpt
from labs.lab import configure, find
from labs.machine import Machine

TINY = configure(LAB, "quick", {"width": 32, "layers": 1, "length": 16, "sequences": 2, "local_steps": 3})
QUICK = configure(LAB, "quick")


class Kept:
    """A recorder that keeps what is recorded, and whose clock stands still unless it is asked."""

    def __init__(self):
        self.values, self.time = {}, 0.0

    def now(self):
        self.time += 1.0
        return self.time

    def record(self, name, value, unit):
        self.values[f"{name}_{unit}" if unit else name] = value


def constants() -> Machine:
    return machine(**GLOO, thread_start_s=1e-4, packed_exp_s=1e-10)


# --- on real ranks ---------------------------------------------------------------------------------


def run_all(addresses, config):
    found = {}
    for address in addresses:
        recorder = Kept()
        step = find(LAB, config, address).setup(config, recorder)
        output = step()
        if hasattr(step, "close"):
            step.close()
        found[address] = output, recorder.values
    return found


RANKS = [v.address for v in LAB.variants(TINY) if v.processes > 1]


@pytest.fixture(scope="module")
def two_ranks(ranks):
    config = replace(TINY, late_s=0.0, target_loss=5.4, most_steps=6)
    return ranks.run(2, run_all, RANKS, config)


def test_every_way_of_two_ranks_trains_what_one_process_trains(two_ranks):
    outputs = {address: output for address, (output, _) in two_ranks[0].items()}
    checks = LAB.check(TINY, outputs)
    assert [check.variant for check in checks] == RANKS
    assert [check for check in checks if not check.passed] == []
    for address, output in outputs.items():
        wrong = output.clone()
        wrong[-1] += 3 * proof.tolerance(TINY, proof._kind(address))
        assert not LAB.check(TINY, {address: wrong})[0].passed, address
        assert not LAB.check(TINY, {address: output * math.nan})[0].passed
    with pytest.raises(TypeError, match="returned no vector of"):
        LAB.check(TINY, {RANKS[0]: output[:-1]})


def test_an_untrained_model_is_no_proof():
    """The tolerance is far below what the steps have moved."""
    import torch

    start = torch.cat([parameter.detach().flatten() for parameter in gpt(TINY.gpt()).parameters()])
    (check,) = LAB.check(TINY, {"step/ddp_gloo": start})
    assert not check.passed
    assert check.error > 20 * check.tolerance


def test_counts_are_predicted_exactly(two_ranks):
    predicted = [each for each in LAB.predict(TINY, constants()) if each.exact]
    counted = {address: values for address, (_, values) in two_ranks[0].items()}
    counted |= {k: v for k, (_, v) in run_all(["memory/single"], TINY).items()}
    for each in predicted:
        assert counted[each.variant][each.key] == each.value, each
    for name in ("ddp", "zero1", "zero2", "fsdp"):
        values = counted[f"bytes/{name}"]
        keys = {each.key for each in predicted if each.variant == f"bytes/{name}"}
        assert keys == set(values) - {"communicated_B"}, "what was not predicted was communicated"
        assert values["communicated_B"] == sum(values[key] for key in keys)


def test_stragglers_record_their_time_to_the_target(two_ranks):
    for name in straggling.WAYS:
        values = two_ranks[0][f"straggler/{name}"][1]
        assert values["steps"] % TINY.local_steps == 0
        assert values["loss_nats"] <= 5.4
        assert values["target_s"] == pytest.approx(values["step_s"] * values["steps"])


def test_replicas_in_one_process_train_the_same():
    found = run_all(["replicas/one_replica", "replicas/data_parallel"], TINY)
    assert all(check.passed for check in LAB.check(TINY, {name: out for name, (out, _) in found.items()}))


def test_shares_are_the_batch():
    import torch

    whole = batches(TINY, 0, 1)
    shares = [batches(TINY, rank, 2) for rank in range(2)]
    for step, (tokens, _) in enumerate(whole):
        assert torch.cat([share[step][0] for share in shares]).equal(tokens)


def test_a_closed_training_lets_go():
    training = build(TINY, "single")
    training.close()
    assert not hasattr(training, "model")


# --- predictions, claims, figures ------------------------------------------------------------------


def predicted_results(counts=None, **times):
    config, host = configure(LAB, "quick", {"width": 128}), constants()
    stated = LAB.predict(config, host)
    found = {address: 0.01 for address in (v.address for v in LAB.variants(config))}
    found |= {each.variant: each.value for each in stated if each.key == "time_s"}
    found |= {"step/ddp_gloo": 0.9 * found["step/torch_ddp_gloo"]}
    values = {(each.variant, each.key): each.value for each in stated if each.key != "time_s"}
    for name, seconds in zip(straggling.WAYS, (1.0, 0.8), strict=True):
        values[f"straggler/{name}", "target_s"] = seconds
        values[f"straggler/{name}", "steps"] = 32.0
    values |= counts or {}
    found |= {name.replace("__", "/"): seconds for name, seconds in times.items()}
    return Predicted(config, host, {"default": found}, values=values)


class Predicted(Stated):
    """Results whose predictions are the lab's."""

    @cached_property
    def of_lab(self):
        return {(p.variant, p.key): p.value for p in LAB.predict(self.config, self.machine)}

    def predicted(self, variant, key="time_s"):
        return self.of_lab.get((variant, key))


def test_every_variant_is_predicted_with_its_numbers_and_a_suspect():
    found = LAB.predict(QUICK, constants())
    unpredicted = {v.address for v in LAB.variants(QUICK)} - {each.variant for each in found}
    assert unpredicted == {f"bytes/{name}" for name in ("torch_ddp", "torch_zero1", "torch_fsdp")}
    for each in found:
        assert each.because
        assert each.suspect
        assert each.value > 0
    assert {each.key for each in found if not each.exact} == {"time_s", "step_s"}


def test_a_step_by_hand():
    """DDP over gloo: 2 hand-overs, 2 exchanges of half the gradients round the ring, none hidden."""
    seconds = model.step(QUICK, constants(), "ddp", "gloo")
    size = model.communicated(QUICK, "ddp")["all_reduce"]
    assert seconds.communication == pytest.approx(2 * 25e-6 + 2 * 2e-4 + size * 8e-10)
    assert seconds.overlap == 0
    assert model.step(QUICK, constants(), "ddp", "shm").communication < seconds.communication / 3
    alone = model.step(QUICK, constants(), "single", "gloo")
    assert alone.total == alone.compute


def test_computing_is_a_training_step_on_new_memory():
    from labs.models.formulas import activation_bytes

    gpt = QUICK.gpt()
    one, two = (
        training_seconds.Batch(gpt, QUICK.sequences, QUICK.length, "float32", ranks=count) for count in (1, 2)
    )
    warm = replace(constants(), allocator="tuned")
    faults = 2 * activation_bytes(gpt, QUICK.sequences, QUICK.length) * constants()["page_fault_s_per_byte"]
    for batch, name, share in ((one, "single", 1), (two, "ddp", 1), (two, "fsdp", 1 / 2)):
        passes = sum(
            each(batch, warm).total for each in (training_seconds.forward, training_seconds.backward)
        )
        plain = passes + share * training_seconds.update(batch, warm)
        assert model.step(QUICK, warm, name, "gloo").compute == pytest.approx(plain)
        assert model.step(QUICK, constants(), name, "gloo").compute == pytest.approx(plain + faults)


def test_overlap_hides_what_needs_no_core():
    free = replace(constants(), constants={**constants().constants, "cores": 8.0})
    bound, spare = (model.step(QUICK, host, "fsdp", "gloo") for host in (constants(), free))
    assert 0 < bound.overlap < spare.overlap <= spare.communication


def test_a_straggler_by_hand():
    """Two ranks: one of both is late with probability 1 - 0.8^2."""
    config = replace(QUICK, late_probability=0.2, late_s=1.0)
    seconds, because = model.straggler(config, constants(), "synchronous")
    alone, _ = model.straggler(replace(config, late_s=0.0), constants(), "synchronous")
    assert seconds - alone == pytest.approx(0.36)
    assert "E[max over 2 ranks of 1 delays]" in because
    assert model.straggler(config, constants(), "local_sgd")[0] < seconds


def test_shares_of_p_ranks():
    for count in (2, 3, 4):
        config = replace(QUICK, ranks=count)
        whole, part = model.held(config, "single"), model.held(config, "fsdp")
        for key in ("parameters", "gradients", "optimizer"):
            assert 1 <= part[key] * count / whole[key] < 1.05
        assert part["activations"] == whole["activations"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 48}, "width=48 is no multiple of 32"),
        ({"ranks": 1}, "ranks=1 is below the minimum of 2"),
        ({"late_probability": 1.5}, "late_probability=1.5 is above the maximum"),
        ({"most_steps": 3}, "most_steps=3 is below local_steps=16: ranks would never meet"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        configure(LAB, "quick", settings)


def slow_gloo():
    """Where messages cost so much that every strategy is bound by communication."""
    results = predicted_results()
    host = replace(results.machine, constants={**results.machine.constants, "gloo_exchange_s_per_byte": 1e-7})
    times = {p.variant: p.value for p in LAB.predict(results.config, host) if p.key == "time_s"}
    return Predicted(results.config, host, {"default": {**results.times, **times}}, values=results.values)


def test_all_claims_hold_when_the_predictions_come_true():
    results = slow_gloo()
    verdicts = {claim.text: claim.holds(results) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("claim", "address"),
    [
        (claims.ours_is_not_slower("ddp"), "step/ddp_gloo"),
        (claims.ours_is_not_slower("fsdp"), "step/fsdp_gloo"),
        (claims.shm_is_faster("ddp"), "step/ddp_shm"),
        (claims.shm_is_faster("zero1"), "step/zero1_shm"),
        (claims.shm_is_faster("fsdp"), "step/fsdp_shm"),
        (claims.threads_gain_nothing, "replicas/one_replica"),
    ],
)
def test_each_claim_about_time_can_fail(claim, address):
    results = slow_gloo()
    assert claim(replace(results, columns={"default": {**results.times, address: 9.0}})) is False
    crowded = replace(results, config=replace(results.config, ranks=3))
    if claim is not claims.threads_gain_nothing:
        assert claim(crowded) is None, "ranks that share a core decide nothing"


@pytest.mark.parametrize(
    ("claim", "key"),
    [
        (claims.memory_is_predicted, ("memory/zero2", "gradients_B")),
        (claims.fsdp_holds_a_share, ("memory/fsdp", "optimizer_B")),
        (claims.bytes_are_predicted, ("bytes/fsdp", "all_gather_B")),
    ],
)
def test_each_claim_about_counts_can_fail(claim, key):
    results = predicted_results()
    assert claim(results) is True
    assert claim(predicted_results({key: 2 * results.values[key]})) is False
    missing = {other: value for other, value in results.values.items() if other != key}
    assert claim(replace(results, values=missing)) is not True


def test_local_sgd_can_lose_and_near_misses_decide_nothing():
    key = ("straggler/local_sgd", "target_s")
    assert claims.local_sgd_arrives_sooner(predicted_results()) is True
    assert claims.local_sgd_arrives_sooner(predicted_results({key: 1.5})) is False
    assert claims.local_sgd_arrives_sooner(predicted_results({key: 0.99})) is None


def test_shm_is_not_judged_where_computing_takes_the_step():
    results = predicted_results()
    fast = {"gloo_exchange_s_per_byte": 1e-12, "gloo_exchange_s": 1e-9, "thread_switch_s": 1e-9}
    host = replace(results.machine, constants={**results.machine.constants, **fast})
    assert claims.shm_is_faster("ddp")(replace(results, machine=host)) is None


@pytest.mark.parametrize(("alone", "verdict"), [(0.75, None), (0.6, False)])
def test_shm_is_judged_from_a_third_of_communication_on(alone, verdict):
    """Predicted and measured alike: 25 and 40 % of the step over gloo."""
    times = {"step/single": alone, "step/torch_ddp_gloo": 1.0, "step/ddp_shm": 0.9}
    assert claims.shm_is_faster("ddp")(Stated(QUICK, constants(), {"default": times})) is verdict


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:40])
def test_nothing_measured_decides_nothing(claim):
    assert decision(claim, Stated(QUICK, constants(), {})) is None


def test_figures_carry_their_numbers_and_survive_json():
    drawn = LAB.figure(predicted_results())
    assert [type(each).__name__ for each in drawn] == ["Bars"] * 5
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)
    assert drawn[0].stacked
    lines = drawn[3].labels
    assert len(lines) == 12
    assert any(line.startswith("fsdp_shm / torch_fsdp_gloo: ") for line in lines)
    assert all(line.rpartition(": ")[2] in ("won", "lost", "cannot tell") for line in lines)
    assert LAB.figure(Stated(QUICK, constants(), {})) == []


def test_groups_are_what_the_docstring_says():
    assert list(dict.fromkeys(v.group for v in LAB.variants(QUICK))) == [
        "memory", "bytes", "step", "replicas", "straggler"
    ]  # fmt: skip
    assert {v.processes for v in LAB.variants(QUICK) if v.group == "step"} == {2}
    assert len(ways.step_names(QUICK)) == 15


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('data_parallel');"
        "configure(lab, 'quick');"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
