"""The precision lab: every way against float64, predictions by hand, claims on stated results."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kept import Kept
from stated import Stated, decision, machine

from labs import figure as figures
from labs.lab import configure, find
from labs.machine import Curve
from labs.precision import LAB, claims, measured, model, sizes
from labs.precision.figures import front

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = configure(
    LAB,
    "quick",
    {"model": "tiny", "windows": 4, "tokens": 8, "prompts": 2, "width": 128, "layers": 2}
    | {"sequences": 2, "context": 70, "prompt": 20},
)


@pytest.mark.parametrize("address", [variant.address for variant in LAB.variants(SMALL)])
def test_every_way_computes_the_same_and_a_wrong_element_is_found(address):
    recorder = Kept()
    step = find(LAB, SMALL, address).setup(SMALL, recorder)
    output = step()
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed, found
    wrong = output.clone()
    wrong.view(-1)[-1] += 1 + math.ceil(2 * found.tolerance + found.error)
    assert not LAB.check(SMALL, {address: wrong})[0].passed
    with pytest.raises(TypeError, match="no tensor of shape"):
        LAB.check(SMALL, {address: output[..., :1]})
    if address.startswith("quality"):
        predicted = {each.variant: each for each in LAB.predict(SMALL, machine()) if each.exact}
        assert recorder.values["weights_B"] == [predicted[address].value]
        if address != "quality/speculative":
            assert len(recorder.values["bits_per_byte_bits"]) == SMALL.windows


@pytest.mark.proof
def test_long_texts_are_continued_with_the_very_same_tokens():
    """Greedy and speculative, all of the context, for drafts that are often wrong."""
    config = replace(SMALL, model="short", tokens=96, prompts=16, lookahead=5)
    address = "quality/speculative"
    recorder = Kept()
    (found,) = LAB.check(config, {address: find(LAB, config, address).setup(config, recorder)()})
    assert found.error == 0
    assert 0.02 < recorder.values["acceptance_share"][-1] < 0.98


# --- predictions ---------------------------------------------------------------------------------


def test_every_variant_is_predicted_and_times_have_a_suspect():
    config = configure(LAB, "quick")
    found = {each.variant: each for each in LAB.predict(config, machine())}
    assert set(found) == {each.address for each in LAB.variants(config)}
    for each in found.values():
        assert each.because
        assert each.exact or (0 < each.value < 100 and each.suspect)


def test_a_token_by_hand():
    """10^9 bytes from memory, and the calls; int4 on a machine that computes slowly is bound by its slots."""
    config = configure(LAB, "quick", {"width": 1280, "layers": 12})
    weights = 12 * 12 * 1280**2
    seconds, because = model.token_seconds(config, machine(), "float32")
    moved = sizes.token_bytes(config.large, "float32")
    assert moved == pytest.approx(4 * weights, rel=0.01)
    assert seconds == pytest.approx(moved / model.reading(machine()) + 12 * (30 * 1e-6 + 6 * 2e-6))
    assert "memory is the limit" in because
    seconds, because = model.token_seconds(config, machine(vector_float32_all_flops=1e9), "int4")
    assert seconds == pytest.approx(2 * 4 * weights / 1e9, rel=0.01)
    assert "compute is the limit" in because


def test_a_prompt_by_hand():
    """Few rows at the rate of few rows; integers are packed as float32 besides."""
    config = configure(LAB, "quick")
    here = machine(torch_thin_product_float32_all_flops=1e9, torch_product_1024_float32_all_flops=9e9)
    weights = 12 * config.width**2
    seconds, _ = model.prompt_seconds(config, here, "float32")
    assert seconds == pytest.approx(2 * weights * config.prompt / 1e9)
    integers, _ = model.prompt_seconds(config, here, "int8")
    assert integers - seconds == pytest.approx(8 * weights / here.bandwidth(model.STRIP_BYTES, threads=0))
    reading, _ = model.prompt_seconds(
        config,
        replace(here, constants={**here.constants, "torch_thin_product_float32_all_flops": 1e15}),
        "float32",
    )
    assert reading == pytest.approx(4 * weights / model.reading(here), rel=0.01)


def test_what_caches_keep_is_taken_off_whatever_their_size():
    """16 MB at 16 GB/s take 1 ms, a quarter of it at 64 GB/s 1/16 ms: 12 MB from memory take 15/16 ms.

    Where a quarter already comes from memory, all of it does. A sheet's curve is one point.
    """
    assert model.reading(machine()) == pytest.approx(12e6 / (15e-3 / 16))
    for sizes_, rates in (((4e6, 8e6, 16e6), (20e9, 20e9, 20e9)), ((1.0,), (20e9,))):
        flat = dict.fromkeys(("copy_all", "read_all"), Curve(sizes_, rates))
        assert model.reading(replace(machine(), curves=flat)) == pytest.approx(20e9)
    slower = {"copy_all": Curve((1.0,), (20e9,)), "read_all": Curve((1.0,), (10e9,))}
    assert model.reading(replace(machine(), curves=slower)) == 10e9


def test_more_tokens_in_a_pass_read_no_more():
    config = configure(LAB, "quick", {"width": 1280, "layers": 12})
    fast = machine(vector_float32_all_flops=1e15)
    one, four = (model.token_seconds(config, fast, "int8", count)[0] for count in (1, 4))
    assert four == pytest.approx(one, rel=0.01)


def test_the_large_model_outgrows_the_cache(monkeypatch):
    from labs import calibration_facts

    monkeypatch.setattr(calibration_facts, "memory_bytes", lambda: 64e9)
    for cache, least in ((32e6, 1e9), (512e6, 8e9)):
        monkeypatch.setattr(calibration_facts, "caches", lambda cache=cache: {"l3_bytes": cache})
        config = configure(LAB, "quick")
        weights = 4 * config.large.layers * sum(m.numbers for m in sizes.matrices(config.large))
        assert least <= weights < least + 4 * 4 * 12 * config.width**2
        assert sizes.token_bytes(config.large, "distilled") > 1.5 * cache


def test_the_large_model_fits_the_memory(monkeypatch):
    """Two cores of a processor with half a gigabyte of cache may have but a share of it, and 24 GB."""
    from labs import calibration_facts

    monkeypatch.setattr(calibration_facts, "caches", lambda: {"l3_bytes": 512e6})
    for memory in (8e9, 24e9):
        monkeypatch.setattr(calibration_facts, "memory_bytes", lambda memory=memory: memory)
        assert LAB.memory_bytes(configure(LAB, "quick")) < 0.55 * memory


def test_a_quick_run_fits_in_four_gigabytes(monkeypatch):
    from labs import calibration_facts

    monkeypatch.setattr(calibration_facts, "caches", lambda: {"l3_bytes": 32e6})
    assert LAB.memory_bytes(configure(LAB, "quick")) < 4.3e9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 200}, "width=200 is no multiple of 128"),
        ({"layers": 3}, "layers=3 is odd"),
        ({"tokens": 64, "model": "tiny"}, "at most 63 can be decoded"),
        ({"model": "fulll"}, "did you mean 'full'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(LAB, "quick", settings)


# --- claims and figures --------------------------------------------------------------------------


BITS = {
    **{
        "float32": 2.0,
        "bfloat16": 2.001,
        "int8": 2.002,
        "int4": 2.05,
        "cache_int8": 2.001,
        "cache_int4": 2.1,
    },
    **{"pruned": 2.2, "structured": 3.0, "healed": 2.5, "tuned": 1.95, "low_rank": 2.8, "early_exit": 2.05},
    **{"distilled": 2.4, "alone": 2.5},
}


def predicted_results(times=None, bits=None, rounds=50.0):
    config = configure(LAB, "quick", {"layers": 6})
    found = LAB.predict(config, machine())
    seconds = {each.variant: each.value for each in found if not each.exact} | (times or {})
    values = {(each.variant, "weights_B"): [each.value] for each in found if each.exact}
    for form, mean in (BITS | (bits or {})).items():
        spread = [mean + 0.1 * math.sin(i) + 0.001 * math.cos(7 * i) * (form != "float32") for i in range(40)]
        values[f"quality/{form}", "bits_per_byte_bits"] = spread
    seconds |= dict.fromkeys({variant for variant, _ in values}, 1.0)  # of judging: no claim asks for it
    values["quality/speculative", "rounds_rounds"] = [rounds]
    values["quality/speculative", "acceptance_share"] = [0.7]
    values["quality/early_exit", "left_early_share"] = [0.4]
    values["quality/float32", "trained_steps_steps"] = [1500.0]
    values["quality/float32", "trained_in_full_share"] = [1.0]
    return Stated(config, machine(), {"default": seconds}, values=values)


def test_all_claims_hold_when_the_predictions_come_true():
    verdicts = {claim.text: claim.holds(predicted_results()) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        (claims.half_is_free, {"bits": {"int8": 2.1}}),
        (claims.four_bits_cost_little, {"bits": {"int4": 2.5}}),
        (claims.structure_costs_more, {"bits": {"pruned": 4.0}}),
        (claims.healing_wins_back, {"bits": {"healed": 2.9}}),
        (claims.healing_wins_back, {"bits": {"tuned": 1.7}}),
        (claims.rounds_give_more, {"rounds": 128.0}),
        (claims.speculation_pays, {"rounds": 110.0}),
        (claims.teaching_helps, {"bits": {"alone": 2.3}}),
        (claims.fewer_bits_are_faster, {"times": {"token/int8": 1.0}}),
        (claims.prompts_gain_less, {"times": {"prompt/int4": 1e-9}}),
        (claims.structure_is_faster, {"times": {"smaller/structured": 1.0}}),
        (claims.zeros_are_not_faster, {"times": {"smaller/sparse": 1e-9}}),
        (claims.exits_save, {"times": {"smaller/early_exit": 1.0}}),
        (claims.verification_is_cheap, {"times": {"speculative/verify": 1.0}}),
        (claims.small_cache_is_faster, {"times": {"cache/bfloat16": 1.0}}),
    ],
)
def test_each_claim_can_fail(claim, changes):
    assert claim(predicted_results(**changes)) is False


@pytest.mark.parametrize(
    ("amx", "share", "holds"),
    [("usable", 0.9, True), ("usable", 1.1, False), ("no", 0.6, True), ("no", 0.9, False)],
)
def test_prompts_gain_more_where_a_matrix_unit_multiplies_integers(amx, share, holds):
    """share: of what a token gains."""
    times = {"token/float32": 3.0, "prompt/float32": 1.0}
    for form in ("int8", "int4"):
        times |= {f"token/{form}": 1.0, f"prompt/{form}": 1 / (3 * share)}
    found = predicted_results(times=times)
    found.machine = replace(found.machine, facts={**found.machine.facts, "amx": amx})
    assert claims.prompts_gain_less(found) is holds


OF_QUALITY = (
    *(claims.half_is_free, claims.four_bits_cost_little, claims.structure_costs_more),
    *(claims.healing_wins_back, claims.rounds_give_more, claims.speculation_pays, claims.teaching_helps),
)


def test_a_model_that_hardly_uses_its_blocks_decides_nothing_about_quality():
    """It can lose nothing by losing them, and is easy to guess."""
    short = predicted_results(bits={form: bits + 1.6 for form, bits in BITS.items()})
    for claim in OF_QUALITY:
        assert claim(short) is None
    assert claims.fewer_bits_are_faster(short) is True


def test_speculation_that_is_predicted_not_to_pay_may_fail_to():
    results = predicted_results(rounds=120.0)
    assert claims.speculation_pays(results) is False
    results.values["quality/speculative", "acceptance_share"] = [0.05]
    assert claims.speculation_pays(results) is None


def test_training_that_does_the_whole_model_no_good_is_not_held_against_healing():
    assert claims.healing_wins_back(predicted_results(bits={"tuned": 2.4, "healed": 2.7})) is True
    assert claims.healing_wins_back(predicted_results(bits={"tuned": 2.4, "healed": 2.8})) is False


def test_nothing_is_healed_where_nothing_was_lost():
    assert claims.healing_wins_back(predicted_results(bits={"structured": 2.0})) is None


def test_the_claim_about_files_can_fail():
    results = predicted_results()
    results.values["quality/int4", "weights_B"] = [1e12]
    assert claims.files_are_as_small(results) is False


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim):
    assert decision(claim, Stated(configure(LAB, "quick"), machine(), {})) is None


def test_a_difference_is_taken_window_by_window():
    """Windows differ by far more than the forms do; the interval is that of the differences."""
    found = measured.excess(predicted_results(), "int8")
    assert found.low < 0.001 < found.high
    assert found.high - found.low < 0.001


def test_speed_counts_the_rounds_and_the_exits_of_the_trained_model():
    results = predicted_results(
        times={"speculative/round": 1.0, "smaller/early_exit": 1.0, "smaller/float32": 2.0}
    )
    assert measured.seconds_per_token(results, "speculative") == pytest.approx(50 / 128)
    assert measured.seconds_per_token(results, "early_exit") == pytest.approx(0.4 * 1 + 0.6 * 2)
    assert measured.seconds_per_token(results, "cache_int8") is None


def test_which_model_was_judged_is_said():
    results = predicted_results()
    assert "the model that make model trained for 1500 steps" in measured.judged_on(results)
    results.values["quality/float32", "trained_in_full_share"] = [0.0]
    assert "`make model` trains the real one" in measured.judged_on(results)
    assert all(measured.judged_on(results) in drawn.note for drawn in LAB.figure(results)[:2])


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.just("form")), max_size=12)


@given(points, st.booleans())
def test_the_front_is_what_nothing_beats(points, more_is_better):
    sign = -1 if more_is_better else 1

    def beaten(point):
        return any(
            sign * other[0] <= sign * point[0] and other[1] <= point[1] and other[:2] != point[:2]
            for other in points
        )

    assert {point[:2] for point in front(points, more_is_better)} == {p[:2] for p in points if not beaten(p)}


def test_figures_carry_their_numbers_and_survive_json():
    drawn = LAB.figure(predicted_results())
    assert [each.title for each in drawn] == [
        "Storage against quality", "Speed against quality", "Speculative decoding",
        "One step over a long KV cache",
    ]  # fmt: skip
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('precision');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "from labs.machine import load_sheet; lab.predict(config, load_sheet('h100'));"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
