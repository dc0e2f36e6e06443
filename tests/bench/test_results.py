"""Verdicts on predictions, what a summary counts, why a run fails, and shares of a budget."""

import copy
import math

import pytest
import tiny_lab

from bench.assemble import failures
from bench.measure import RoundRecorder, Rounds
from bench.plan import Plan
from bench.results import LabResults, claim_rows, compared_predictions, prediction_verdict, summary
from labs.lab import Claim, Interval, Measurement, NotMeasured, Variant
from labs.machine import Machine


@pytest.mark.parametrize(
    ("predicted", "measured", "exact", "verdict"),
    [
        (1.0, 1.0, False, "confirmed"),
        (1.0, 2**0.49, False, "confirmed"),
        (1.0, 2**-0.49, False, "confirmed"),
        (1.0, 2**0.51, False, "close"),
        (1.0, 2**-0.99, False, "close"),
        (1.0, 2**1.01, False, "off"),
        (1.0, 2**-1.01, False, "off"),
        (0.0, 1.0, False, "off"),
        (1.0, 0.0, False, "off"),
        (-1.0, 1.0, False, "off"),
        (1.0, math.nan, False, "off"),
        (1.0, None, False, "not measured"),
        (1.0, None, True, "not measured"),
        (4096, 4096, True, "exact"),
        (0, 0, True, "exact"),
        (4096, 4097, True, "differs"),
    ],
)
def test_the_verdict_on_a_prediction(predicted, measured, exact, verdict):
    assert prediction_verdict(predicted, measured, exact) == verdict


def row(key, ratio, exact=False):
    verdict = prediction_verdict(1.0, ratio, exact)
    return {"key": key, "ratio": ratio, "exact": exact, "verdict": verdict}


def test_the_summary_is_about_times_alone():
    times = [row("time_s", 1.0), row("wait_s", 4.0), row("first_s", 0.5), row("time_s", None)]
    others = [row("sent_B", 8.0), row("speed_flops_per_s", 8.0), row("open_s", 8.0, exact=True)]
    assert summary(times + others) == {"times": 3, "median_abs_log2": 1.0, "off": 1}
    assert summary(times[:2])["median_abs_log2"] == 1.0  # of an even number the middle of the two
    assert summary(others) == {"times": 0, "median_abs_log2": None, "off": 0}


FINE = {"status": "done", "error": "", "checks": [], "predictions": [], "claims": []}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"status": "failed", "error": "second: lost"}, "a failed: second: lost"),
        ({"status": "partial"}, "a partial: not every group was measured"),
        ({"claims": [{"text": "b", "verdict": "fails"}]}, "a: claim fails: b"),
        ({"claims": [{"text": "b", "verdict": "undecidable"}]}, None),
        (
            {"predictions": [dict(variant="b", key="n", verdict="differs", measured=2, predicted=1)]},
            "a: b n is 2, exactly 1 was predicted",
        ),
        ({"predictions": [{"verdict": "off"}]}, None),
        (
            {"checks": [dict(variant="b", column="c", against="d", error=2.0, tolerance=1.0, passed=False)]},
            "a: b (c) differs from d: error 2, allowed 1",
        ),
    ],
)
def test_why_a_run_fails(change, line):
    results = {"perflab": {"labs": {"a": {**FINE, **change}, "z": FINE}}}
    assert failures(results) == ([line] if line else [])


def test_a_budget_is_shared_by_what_is_timed_in_rounds(monkeypatch):
    from dataclasses import replace

    made = [Variant("many", name, print) for name in "abc"] + [Variant("many", "d", print, unavailable="no")]
    made += [Variant("one", "a", print), Variant("one", "once", print, max_rounds=1)]
    made += [Variant("onces", "once", print, max_rounds=1)]
    lab = replace(tiny_lab.LAB, variants=lambda config: made, seconds=8.0)
    shares = {"many": 6.0, "one": 2.0, "onces": 0.0}
    for scale, factor in {"quick": 1, "normal": 3, "full": 10}.items():
        plan = Plan({"tiny_lab": {}}, scale)
        found = {group: plan.budget_seconds(lab, group) for group in shares}
        assert found == {group: factor * share for group, share in shares.items()}
    once = replace(lab, variants=lambda config: made[-1:])
    assert Plan({"tiny_lab": {}}, "quick").budget_seconds(once, "onces") == 8.0


def view(**extra):
    """The results of one variant that was timed in five rounds."""
    extra = {"lab": "tiny_lab", "variant": "second/insertion", "allocator": "default", **extra}
    entry = {"extra_info": extra, "stats": {"data": [1.0, 1.1, 0.9, 1.0, 1.0]}}
    return LabResults(tiny_lab.LAB, tiny_lab.Config(), Machine("here", True, {}), [entry])


def compared(key, value, exact=False, derived=(), variant="second/insertion", **extra):
    item = {"variant": variant, "key": key, "value": value, "exact": exact}
    (found,) = compared_predictions({"default": [item]}, {"default": view(**extra)}, derived)
    return found


def test_a_recorded_quantity_is_the_median_of_its_rounds_with_its_interval():
    found = compared("first_s", 1.0, by_round={"first_s": [1.0, 1.2, 0.9, 1.1, 9.0]})
    assert found["measured"] == pytest.approx(1.1)  # and not the last
    assert found["low"] < 1.1 < found["high"]
    signed = compared("offset_s", 1.0, by_round={"offset_s": [-1.0, 1.0, 0.0]})
    assert signed["measured"] == 0.0
    assert signed["low"] < 0 < signed["high"]


def test_what_was_measured_once_has_no_interval():
    for found in (
        compared("first_s", 1.0, measured={"first_s": 2.0}),
        compared("first_s", 1.0, by_round={"first_s": [2.0]}),
        compared("first_s", 1.0, by_round={"first_s": [2.0] * 5}),
        compared("x_s", 1.0, variant="", derived=[Measurement("x_s", Interval.exact(2.0))]),
    ):
        assert (found["measured"], found["low"], found["high"]) == (2.0, None, None)


def test_no_round_may_differ_from_an_exact_count():
    assert compared("sent_B", 8, exact=True, by_round={"sent_B": [8.0] * 5})["verdict"] == "exact"
    one = compared("sent_B", 8, exact=True, by_round={"sent_B": [8.0, 8.0, 9.0, 8.0, 8.0]})
    assert (one["verdict"], one["measured"]) == ("differs", 9.0)


def test_rounds_keep_the_last_value_of_each_and_not_what_setup_or_a_profile_recorded():
    recorder = RoundRecorder()
    recorder.record("made", 1.0, "s")
    rounds = Rounds(lambda: recorder.values)
    for number in range(3):
        recorder.begin_round()
        recorder.record("first", number, "s")
        recorder.record("first", number + 10, "s")
        rounds.keep()
    with recorder.aside():
        recorder.record("first", 99, "s")
    recorder.record("closed", 5.0, "s")  # by the step's close
    assert rounds.values == {"first_s": [10.0, 11.0, 12.0]}
    assert recorder.values == {"made_s": [1.0], "first_s": [2.0, 12.0], "closed_s": [5.0]}


def test_a_fault_of_a_claim_is_none_of_what_was_not_measured():
    def asks_for(name):
        return lambda results: results.seconds(name).value > 0

    claims = {"measured": asks_for("second/insertion"), "not measured": asks_for("second/quantum")}
    claims["fault"] = lambda results: {}["no such key"]
    from dataclasses import replace

    lab = replace(tiny_lab.LAB, claims=[Claim(text, holds, "why") for text, holds in claims.items()])
    found = {row["text"]: row for row in claim_rows(lab, view())}
    assert {text: row["verdict"] for text, row in found.items()} == {
        "measured": "holds",
        "not measured": "undecidable",
        "fault": "fails",
    }
    assert "KeyError" in found["fault"]["why"]
    with pytest.raises(NotMeasured, match="recorded no 'sent'"):
        view().recorded("second/insertion", "sent")


def test_a_lab_that_can_no_longer_be_read_costs_the_others_nothing(results, monkeypatch):
    from bench import assemble

    section = results["perflab"]["labs"]["tiny_lab"]
    header = {
        "event": "plan",
        "labs": {name: {"items": 10, "pause": 0.0, "fault": ""} for name in ("gone", "tiny_lab")},
        "machine": results["perflab"]["machine"],
        "commands": {"gone": "perflab run gone", "tiny_lab": section["command"]},
        **{key: results["perflab"][key] for key in ("command", "started", "scale", "device", "notes")},
    }
    monkeypatch.setattr(assemble, "load", {"tiny_lab": copy.copy(tiny_lab.LAB)}.__getitem__)
    labs = assemble.assemble([header])["perflab"]["labs"]
    assert labs["gone"]["status"] == "failed"
    assert "KeyError" in labs["gone"]["error"]
    assert labs["tiny_lab"]["status"] == "partial"
    from rich.console import Console

    from bench.report import print_lab

    for name, lab in labs.items():
        print_lab(lab, Console(), name)


def test_why_there_is_no_figure_is_said_everywhere(results, capsys):
    from rich.console import Console

    from bench.report import print_lab, render_page, to_markdown

    made = copy.deepcopy(results)
    lab = made["perflab"]["labs"]["tiny_lab"]
    lab["figures"], lab["figure_error"] = [], "second/quantum was not measured here"
    print_lab(lab, Console(width=200), "tiny_lab")
    for text in (capsys.readouterr().out, to_markdown(made), render_page(made)):
        assert lab["figure_error"] in text
