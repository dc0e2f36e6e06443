"""The claims of the pipeline lab hold when its predictions come true, and each can fail."""

from dataclasses import replace

import pytest
from pipeline_results import LAB, QUICK, as_predicted, constants
from stated import Stated, decision

from labs.pipeline import claims, derived
from labs.pipeline.config import SCHEDULES
from labs.pipeline.running import VIRTUAL


def test_all_claims_hold_when_the_predictions_come_true():
    results = as_predicted()
    verdicts = {claim.text: claim.holds(results) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts
    measured = LAB.derive(results)
    assert len(measured) == 2 * len(SCHEDULES)
    for each in measured:
        assert each.interval.value == pytest.approx(1.0), each


@pytest.mark.parametrize(
    ("claim", "address"),
    [
        (claims.virtual_order, "virtual/zb_v"),
        (claims.real_order("gpt"), "gpt/dualpipe_v"),
        (claims.real_order("encoder_decoder"), "encoder_decoder/interleaved_1f1b"),
        (claims.faster("interleaved_1f1b", "1f1b"), "virtual/interleaved_1f1b"),
        (claims.faster("zb_v", "interleaved_1f1b"), "virtual/zb_v"),
    ],
)
def test_each_claim_about_time_can_fail(claim, address):
    results = as_predicted()
    assert claim(results) is True
    assert claim(replace(results, columns={"default": {**results.times, address: 9.0}})) is False


@pytest.mark.parametrize(
    ("claim", "key", "count"),
    [
        (claims.activations_are_predicted, ("gpt/zb_h1", "rank1_in_flight"), 3.0),
        (claims.holds_less("1f1b", "gpipe"), (f"{VIRTUAL}/1f1b", "in_flight"), 8.0),
        (claims.holds_less("v_half", "1f1b"), (f"{VIRTUAL}/v_half", "in_flight"), 8.0),
    ],
)
def test_each_claim_about_counts_can_fail(claim, key, count):
    assert claim(as_predicted()) is True
    assert claim(as_predicted(counts={key: count})) is False


def test_ties_are_no_order_and_ranks_that_share_a_core_decide_nothing():
    """GPipe and 1F1B are predicted alike: which is faster is left open."""
    slower = as_predicted(virtual__gpipe=1.04 * as_predicted().times["virtual/1f1b"])
    assert claims.virtual_order(slower) is True
    results = as_predicted(replace(QUICK, stages=3, layers=12))
    assert claims.real_order("gpt")(results) is None


def test_what_gloo_takes_from_busy_cores_is_no_order_of_real_stages():
    said = {"a": 0.92, "b": 1.0}
    for tie, expected in ((claims.TIE, False), (claims.REAL_TIE, None)):
        results = as_predicted(gpt__a=1.1, gpt__b=1.0)
        assert claims.in_order(results, "gpt", said, tie) is expected
    assert claims.in_order(results, "gpt", {"a": 0.89, "b": 1.0}, claims.REAL_TIE) is False
    results = as_predicted()
    said = {name: derived.from_stage_times(results, "gpt", name) for name in SCHEDULES}
    fast, slow = next((a, b) for a in said for b in said if 0.91 * said[b] < said[a] < 0.94 * said[b])
    reversed_ = dict(results.times) | {f"gpt/{fast}": 1.03 * results.times[f"gpt/{slow}"]}
    reversed_ = replace(results, columns={"default": reversed_})
    assert claims.in_order(reversed_, "gpt", said, claims.TIE) is False
    assert claims.real_order("gpt")(reversed_) is True


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:40])
def test_nothing_measured_decides_nothing(claim):
    assert decision(claim, Stated(QUICK, constants(), {})) is None


def test_nothing_is_derived_from_what_was_not_measured():
    results = as_predicted()
    alone = {
        address: time for address, time in results.times.items() if not address.startswith("stage_times")
    }
    assert derived.derive(replace(results, columns={"default": alone})) == []
    assert derived.step_ratio(results, "gpt", "1f1b") is not None
