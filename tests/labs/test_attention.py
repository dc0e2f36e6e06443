"""The attention lab: its counts against the masks, every way against float64, its claims on stated times."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stated import Stated, machine

from labs import figure as figures
from labs.attention import LAB, claims, inputs, model, proof, ways
from labs.lab import configure, find
from labs.memory import extra_bytes

SMALL = configure(LAB, "quick", {"length": 96, "dim": 16, "window": 10, "sequences": 3, "block": 7})


class Silent:
    """A recorder that keeps what is recorded."""

    def __init__(self):
        self.values = {}

    def record(self, name, value, unit):
        self.values[f"{name}_{unit}"] = value


@given(st.sampled_from(["full", "causal", "window"]), st.integers(1, 40), st.integers(1, 50))
def test_pairs_are_the_ones_of_the_mask(kind, length, window):
    mask = ways.mask_of(kind, length, window)
    expected = length**2 if mask is None else int(mask.sum())
    assert model.pairs(kind, length, window) == expected


def test_flops_of_the_full_one_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = inputs.qkv(SMALL, 96, SMALL.heads)
    with FlopCounterMode(display=False) as counter:
        ways.naive(query, key, value)
    assert model.work(SMALL, "full", 96, "fused").flops == counter.get_total_flops()


def test_pages_hold_the_cache_whatever_their_order():
    _, keys, _ = inputs.token(SMALL, 24)
    pages, table = inputs.paged(SMALL, keys)
    gathered = pages[table.long()].flatten(1, 2)[:, :24].transpose(1, 2)
    assert gathered.equal(keys)


def test_eight_bits_are_off_by_half_a_step_at_most():
    _, keys, _ = inputs.token(SMALL, 24)
    small, scale = inputs.quantized(keys)
    assert ((small * scale - keys).abs() <= 0.5001 * scale).all()
    assert small.abs().amax(-1).eq(127).all()  # no finer step would do


@pytest.mark.parametrize("address", [variant.address for variant in LAB.variants(SMALL)])
def test_every_way_computes_the_same_and_a_wrong_element_is_found(address):
    recorder = Silent()
    step = find(LAB, SMALL, address).setup(SMALL, recorder)
    output = step()
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed, found
    wrong = output.clone()
    wrong.view(-1)[-1] += 2 * found.tolerance + found.error
    assert not LAB.check(SMALL, {address: wrong})[0].passed
    assert not LAB.check(SMALL, {address: output * math.nan})[0].passed
    with pytest.raises(TypeError, match="no tensor of shape"):
        LAB.check(SMALL, {address: output[:1, :1]})
    if sys.platform == "linux":
        assert recorder.values["extra_memory_B"] >= 0


def test_the_int8_bound_is_not_idle():
    """It is above the error that is there and below the size of the result."""
    address = "token_96/cache_int8"
    (found,) = LAB.check(SMALL, {address: find(LAB, SMALL, address).setup(SMALL, Silent())()})
    assert found.tolerance / 1000 < found.error < found.tolerance < 1


def test_memory_of_the_naive_way_is_seen():
    import torch

    step = lambda: torch.ones(2**24).sum()  # noqa: E731
    grown = extra_bytes(step)
    if grown is None:
        pytest.skip("this system does not tell a process its highest resident size")
    assert 0.9 * 2**26 < grown < 1.5 * 2**26


# --- predictions, claims, figures ------------------------------------------------------------------


def predicted_results(**times):
    config = configure(LAB, "quick", {"length": 2048})
    columns = {}
    for mode in LAB.columns:
        found = {each.variant: each.value for each in LAB.predict(config, machine().with_allocator(mode))}
        columns[mode] = found | {name.replace("__", "/"): seconds for name, seconds in times.items()}
    scores = 4.0 * config.heads * config.length**2
    values = {
        ("full_2048/naive", "extra_memory_B"): 2.0 * scores,
        ("full_2048/fused", "extra_memory_B"): 4.0 * config.heads * config.length * config.dim,
    }
    return Stated(config, machine(), columns, values=values)


def test_every_variant_is_predicted_with_its_numbers_and_a_suspect():
    found = {each.variant: each for each in LAB.predict(configure(LAB, "quick"), machine())}
    assert set(found) == {each.address for each in LAB.variants(configure(LAB, "quick"))}
    for each in found.values():
        assert 0 < each.value < 100
        assert each.because
        assert each.suspect


def test_the_full_one_by_hand():
    seconds, because = model.seconds(SMALL, machine(), "full", 96, "fused")
    pairs = SMALL.heads * 96**2
    assert seconds == pytest.approx(1e-6 + pairs * (4 * 16 + 2 * 25) / 100e9)
    assert "GFLOP/s" in because


def test_heads_that_cannot_be_shared_by_four_are_refused():
    with pytest.raises(ValueError, match="heads=6 is not a multiple of 4"):
        configure(LAB, "quick", {"heads": 6})


def test_all_claims_hold_when_the_predictions_come_true():
    results = predicted_results()
    verdicts = {claim.text: claim.holds(results) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("claim", "times"),
    [
        (claims.fused_is_faster, {"full_2048__naive": 1e-9}),
        (claims.causal_skips_half, {"causal_2048__fused": 1.0}),
        (claims.window_is_linear, {"window_2048__fused": 1.0}),
        (claims.sharing_saves_the_copy, {"gqa_2048__fused": 1.0}),
        (claims.cache_saves_everything, {"token_2048__cache": 1.0}),
        (claims.pages_cost_little, {"token_2048__pages": 1.0}),
    ],
)
def test_each_claim_can_fail(claim, times):
    assert claim(predicted_results(**times)) is False


def test_the_memory_claim_can_fail():
    results = predicted_results()
    greedy = replace(results, values=dict.fromkeys(results.values, 1e12))
    assert claims.fused_saves_memory(greedy) is False


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim):
    assert claim.holds(Stated(configure(LAB, "quick"), machine(), {})) is None


def test_figures_carry_their_numbers_and_survive_json():
    drawn = LAB.figure(predicted_results())
    assert len(drawn) == 3
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('attention');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_reference_is_causal_where_it_should_be():
    """The last query of a causal reference is the full one's; the first sees one key only."""
    causal, full = (proof._reference(SMALL, kind, 24) for kind in ("causal", "full"))
    assert causal[:, :, -1].allclose(full[:, :, -1])
    assert causal[:, :, 0].allclose(inputs.qkv(SMALL, 24, SMALL.heads)[2].double()[:, :, 0])
