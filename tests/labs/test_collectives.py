"""The collectives lab: every way against a plain computation on real ranks, counts, fits, claims."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stated import Stated, decision, linked, machine

from labs import figure as figures
from labs.collectives import LAB, calls, claims, derived, inputs, model, overlap, proof
from labs.collectives import figures as pictures
from labs.collectives.config import SMALL_KIB
from labs.collectives.ways import SWEEP, SWEEP_WAYS, variants
from labs.lab import Interval, configure, find

TINY = {"size_KiB": 1, "large_KiB": 512, "layers": 3, "width": 32, "compute_ms": 3, "link_ms": 3}
SMALL = configure(LAB, "quick", TINY)
QUICK, MORE = configure(LAB, "quick"), configure(LAB, "normal")


class Recorder:
    """Keeps what is recorded."""

    def __init__(self):
        from time import perf_counter

        self.now, self.values = perf_counter, {}

    def record(self, name, value, unit):
        self.values.setdefault(f"{name}_{unit}", []).append(value)


def run_all(config, addresses):
    """On a rank: the proof material of each variant, a second result, and what was recorded."""
    found = {}
    for address in addresses:
        recorder = Recorder()
        step = find(LAB, config, address).setup(config, recorder)
        output = step()
        recorder.values.update({name: [] for name in recorder.values if "begin" in name or "end" in name})
        again = step()
        step.close()
        again = None if again is None else again.clone().numpy()
        found[address] = output, again, recorder.values
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.proof)])
def test_every_way_gives_every_rank_the_plain_result_and_a_wrong_element_is_found(ranks, world):
    config = replace(SMALL, ranks=world)
    addresses = [each.address for each in variants(config)]
    answers = ranks.run(world, run_all, config, addresses)
    outputs = {address: answers[0][address][0] for address in addresses}
    checks = {each.variant: each for each in LAB.check(config, outputs)}
    assert set(checks) == set(addresses)
    assert all(each.passed and each.error == 0 for each in checks.values()), checks
    for address in addresses:
        for rank, answer in enumerate(answers):  # later calls return what the first, which is shown, did
            again, shown = answer[address][1], outputs[address][rank]
            assert (again is None) == (shown is None)
            assert shown is None or np.array_equal(calls.material(torch.from_numpy(again), world), shown)
        holder = max(rank for rank, got in enumerate(outputs[address]) if got is not None)
        for wrong in (0.5, float("nan")):
            broken = [None if got is None else got.copy() for got in outputs[address]]
            broken[holder].reshape(-1)[-1] += wrong
            assert not LAB.check(config, {address: broken})[0].passed, address
    predicted = {each.variant: each.value for each in LAB.predict(config, linked()) if each.key == "sent_B"}
    counted = {
        address: values["sent_B"] for address, (_, _, values) in answers[0].items() if "sent_B" in values
    }
    assert counted == {address: [value] for address, value in predicted.items()}
    assert len(counted) == 10
    lanes(config, answers[0])


def lanes(config, answer):
    """Waited for at once, no layer computes before the collective of the one before is through;
    asynchronously the last layer's compute begins before some collective is."""
    for kind in overlap.KINDS:
        for name in ("waited", "asynchronous"):
            values = answer[f"overlap_{kind}/{name}"][2]
            begins, ends = values["compute_begin_s"], values["communication_end_s"]
            assert len(begins) == len(ends) == config.layers
            early = [begin < end for begin, end in zip(begins[1:], ends, strict=False)]
            assert all(early) if name == "asynchronous" and kind == "matmul" else True
            assert not any(early) if name == "waited" else any(early)


def test_the_proof_refuses_what_is_no_result_of_every_rank():
    good = [np.zeros(SMALL.elements(2, 1), np.float32)] * 2
    with pytest.raises(TypeError, match="no list of 2 ranks' results"):
        proof.check(SMALL, {"all_reduce/gloo": good[0]})
    with pytest.raises(TypeError, match="rank 1 returned no tensor of shape"):
        proof.check(SMALL, {"all_reduce/gloo": [good[0], good[0][:1]]})
    with pytest.raises(TypeError, match="rank 1 has a result, but only the root should"):
        proof.check(SMALL, {"gather/gloo": good})


def test_of_a_large_result_every_element_is_in_the_proof():
    result = torch.zeros(2**19 + 5)
    plain = calls.material(result, 2)
    assert plain.numel() * 2 < calls.MOST_SHOWN
    for place in (0, 1, 100_003, 2**19 + 4):
        wrong = result.clone()
        wrong[place] = 1e-3
        assert not calls.material(wrong, 2).equal(plain)


@pytest.mark.parametrize("more", [1, 2])
def test_a_second_world_must_be_another_one(more):
    with pytest.raises(ValueError, match=f"more_ranks={more} is no other world than ranks=2"):
        configure(LAB, "quick", {"more_ranks": more})


def test_vectors_divide_by_the_ranks_and_sums_stay_exact():
    assert SMALL.elements(3, 1) == 258
    assert 64 * 1000 < 2**24  # of a full world's sum
    assert 64 * 4 * 512 * SMALL.layers < 2**24
    values = inputs.whole(1, 1000)
    assert values.equal(values.round())
    assert values.abs().max() <= 1000


# --- formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "communication"), [(3.0, 2.0), (2.0, 3.0)])
def test_layers_are_those_of_a_simulated_pipeline(compute, communication):
    ready = link_free = 0.0
    for _ in range(5):
        ready += compute
        link_free = max(link_free, ready) + communication
    assert model.layers(compute, communication, 5, "asynchronous") == link_free
    assert model.layers(compute, communication, 5, "waited") == 25.0


@given(st.floats(0, 1e-2), st.floats(1e-12, 1e-8))
def test_a_line_is_found_again(alpha, beta):
    sizes = [1024.0 * kib for kib in SMALL_KIB]
    found = derived.least_squares(sizes, [alpha + beta * size for size in sizes])
    assert found == pytest.approx((alpha, beta), rel=1e-6, abs=1e-9 * (alpha + beta * sizes[-1]))


def test_a_line_is_never_negative_and_needs_two_points():
    assert derived.least_squares([1.0, 2.0], [2.0, 1.0])[1] == 0
    alpha, beta = derived.least_squares([1.0, 2.0, 4.0], [1.0, 3.0, 8.0])
    assert alpha == 0
    assert 1.0 < beta < 2.0
    with pytest.raises(ValueError, match="two points or more"):
        derived.least_squares([1.0], [1.0])


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=5))
def test_uncertainties_of_a_sum_add_as_squares(ends):
    found = derived.propagated(sum, [Interval(value, value - low, value + high) for value, low, high in ends])
    values, lows, highs = zip(*ends, strict=True)
    expected = sum(values), sum(values) - math.hypot(*lows), sum(values) + math.hypot(*highs)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-9)


def test_uncertain_small_times_leave_the_large_one_undecided():
    """A line through times of the same interval, drawn out 16 times as far, says little."""

    class Noisy(Stated):
        def seconds(self, variant):
            value = self.times[variant]
            return Interval(value, 0.8 * value, 1.3 * value)

    large = f"{SWEEP}/ours_ring_{QUICK.large_KiB}"
    times = {f"{SWEEP}/ours_ring_{kib}": 1.1e-3 + 1.5e-6 * kib for kib in SMALL_KIB} | {large: 2.2e-3}
    decided = claims._fit_holds("ours_ring")
    assert decided(Stated(QUICK, machine(), {"default": times})) is False
    assert decided(Noisy(QUICK, machine(), {"default": times})) is None


def test_the_links_collective_takes_what_is_set():
    from parallel.collective_costs import cost

    config = replace(QUICK, ranks=3)
    size = 4 * config.bucket_rows * config.width
    assert cost("all_reduce", size, 3, *overlap.link_constants(config), "ring") == pytest.approx(4e-3)


def test_every_variant_is_predicted_and_more_ranks_even_if_not_measured():
    for config in (QUICK, MORE):
        found = [each for each in LAB.predict(config, linked()) if each.key == "time_s"]
        assert {each.variant for each in found} == {each.address for each in variants(config)}
        assert len(found) == len({each.variant for each in found})
        assert all(0 < each.value < 100 and each.because and each.suspect for each in found)
    unmeasured = {each.key: each for each in LAB.predict(QUICK, linked()) if "_ranks_s" in each.key}
    assert len(unmeasured) == 6
    assert all("not measured" in each.because for each in unmeasured.values())


# --- claims, figures ----------------------------------------------------------------------------------


def predicted_results(config=MORE, **times):
    found = LAB.predict(config, linked())
    seconds = {each.variant: each.value for each in found if each.key == "time_s"}
    sent = {(each.variant, "sent_B"): each.value for each in found if each.key == "sent_B"}
    # Both ways' transfers are predicted alike: what a busy root spares the others is what measuring shows.
    seconds |= {name: 0.9 * seconds[name] for name in seconds if name.startswith(("gather/", "scatter/"))}
    return Predicted(
        config,
        linked(),
        {"default": seconds | {name.replace("__", "/"): value for name, value in times.items()}},
        values=sent,
    )


class Predicted(Stated):
    """Its times are what was predicted, and so are its counts, whatever was counted."""

    def predicted(self, variant, key="time_s"):
        assert self.has(variant), "as in a run, of a variant that was measured"
        if variant == "overlap_matmul/compute":
            compute, _, _ = model.layer_seconds(self.config, self.machine, "matmul")
            return self.config.layers * compute
        if key == "sent_B":
            elements = self.config.elements(self.config.ranks, self.config.size_KiB)
            group, _, way = variant.partition("/")
            return float(model.sent(group, way, elements, self.config.ranks))
        return super().predicted(variant, key)


def test_all_claims_hold_when_the_predictions_come_true():
    verdicts = {claim.text: claim.holds(predicted_results()) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


LARGE = f"{SWEEP}/shm_{MORE.large_KiB}".replace("/", "__")


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("Gather takes", {"gather__gloo": 1.0}),
        ("Scatter takes", {"scatter__ours": 1.0}),
        ("Shared memory is", {f"{SWEEP}__shm_4": 1.0}),
        ("Alpha and beta of shm", {LARGE: 1.0}),
        ("More ranks", {"all_reduce_4_ranks__gloo": 1e-9}),
        ("Asynchronous layers", {"overlap_virtual__asynchronous": 1.0}),
        ("So they do", {"overlap_matmul__asynchronous": 1.0}),
    ],
)
def test_each_claim_about_time_can_fail(text, times):
    (claim,) = [each for each in LAB.claims if each.text.startswith(text)]
    assert claim.holds(predicted_results(**times)) is False


@pytest.mark.parametrize(
    "text", ["Where one rank needs", "Where one rank has", "Who needs", "Every collective"]
)
def test_each_claim_about_bytes_can_fail(text):
    (claim,) = [each for each in LAB.claims if each.text.startswith(text)]
    results = predicted_results()
    greedy = {
        key: value + 4 * 10**7 * (not key[0].startswith("all_")) for key, value in results.values.items()
    }
    assert claim.holds(replace(results, values=greedy)) is False


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim):
    assert decision(claim, Stated(QUICK, machine(), {})) is None


def test_one_world_leaves_more_ranks_undecided():
    assert claims.more_ranks_cost_more(predicted_results(QUICK)) is None


def test_the_fit_of_true_predictions_is_the_predicted_line():
    measured = {each.key: each.interval.value for each in LAB.derive(predicted_results())}
    predicted = {each.key: each.value for each in LAB.predict(MORE, linked()) if not each.variant}
    assert set(measured) == set(predicted)
    for way in SWEEP_WAYS:
        for key in (f"fit_{way}_latency_s", f"fit_{way}_s_per_byte", f"large_{way}_ratio"):
            assert measured[key] == pytest.approx(predicted[key], rel=0.02), key
    for kind in overlap.KINDS:
        assert measured[f"hidden_{kind}_ratio"] == pytest.approx(predicted[f"hidden_{kind}_ratio"])


class Lanes(Predicted):
    """Three layers that overlap."""

    def recorded(self, variant, name):
        if not variant.startswith("overlap"):
            return super().recorded(variant, name)
        times = {
            "compute_begin_s": [10, 11, 12], "compute_end_s": [11, 12, 13],
            "communication_begin_s": [11, 12, 13], "communication_end_s": [12.5, 14, 15.5],
        }  # fmt: skip
        return times[name] * 2  # a sample of two calls: the first is drawn


def test_figures_carry_their_numbers_and_survive_json():
    results = Lanes(**vars(predicted_results(replace(MORE, layers=3))))
    drawn = LAB.figure(results)
    assert len(drawn) == 9
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)
    lane = pictures.spans(results, "overlap_virtual/asynchronous", "communication")
    assert [(span.begin, span.end) for span in lane] == [(1, 2.5), (2.5, 4), (4, 5.5)]
    assert len(LAB.figure(predicted_results(QUICK))) == 5  # without recorded lanes


def test_a_collective_that_is_through_before_the_one_started_earlier_is_drawn_as_it_was():
    class Overtaken(Lanes):
        def recorded(self, variant, name):
            return [12.5, 15.5, 14] * 2 if name == "communication_end_s" else super().recorded(variant, name)

    results = Overtaken(**vars(predicted_results(replace(MORE, layers=3))))
    lane = pictures.spans(results, "overlap_virtual/asynchronous", "communication")
    assert [(span.begin, span.end) for span in lane] == [(1, 2.5), (2.5, 5.5), (3, 4)]


@pytest.mark.proof
def test_a_real_group_is_measured_proved_and_recorded(monkeypatch):
    from pathlib import Path

    from bench.measure import measure_group
    from bench.world.steps import Worlds

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    worlds = Worlds()
    try:
        result = measure_group(LAB, SMALL, "overlap_virtual", budget_seconds=0.2, worlds=worlds)
        assert not result.errors
        assert {each.variant.name for each in result.measured} == set(overlap.NAMES)
        assert len(result.checks) == 4
        assert all(check.passed for check in result.checks)
        recorded = {each.variant.name: each.extra_info["recorded"] for each in result.measured}
        assert len(recorded["asynchronous"]["communication_end_s"]) >= SMALL.layers
        median = {each.variant.name: sorted(each.timed.seconds)[1] for each in result.measured}
        assert median["waited"] > 3 * 6e-3  # each layer sleeps and waits for the link
    finally:
        worlds.close()


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('collectives');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_algorithms_are_named_by_their_way():
    assert calls.algorithm_of("ours_halving_doubling") == "halving_doubling"
    assert calls.algorithm_of("ours") is calls.algorithm_of("gloo") is None
