"""The serving lab: predictions, claims that can fail, figures, settings."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from stated import Stated, machine

from labs import figure as figures
from labs import load
from labs.lab import configure
from labs.serving import derived, extrapolation
from labs.serving import figures as drawn
from labs.serving.claims import CLAIMS
from labs.serving.config import Config
from labs.serving.costs import Costs, Wires
from labs.serving.layout import POLICIES
from labs.serving.model import LIVE, costs_of, numbers_in_matrices, simulated
from labs.serving.weights import serving_model

LAB = load("serving")
QUICK = configure(LAB, "quick")
HOST = machine()
COSTS = Costs(2e-3, 1e-3, 1e-4, 1e-7, 5e-8, 1e-3, 4e-4, 1e-6)
WIRES = Wires(1e-3, 2e-3, 5e-4, 1e-9, 3e-3, 2e-9)
BLOCKS = 3


class Recorded(Stated):
    """Lists of values."""

    def recorded(self, variant, name):
        return self.values.get((variant, name), [])


def results(config=QUICK, refused=False, slower=1.0, **changes):
    """Live blocks as the simulator says, times ``slower``; calibration; a winner map."""
    times = {variant.address: 1.0 for variant in LAB.variants(config)}
    values = {}
    if not refused:
        for prefix, costs in (("cost", COSTS), ("wire", WIRES)):
            for name, value in asdict(costs).items():
                values[derived.CALIBRATION, f"{prefix}_{name}_s"] = [value]
    for policy in POLICIES:
        address = f"{LIVE}/{policy}"
        rows = [simulated(config, policy, block, COSTS, WIRES) for block in range(1, BLOCKS + 1)]
        for key in ("ttft_p50", "itl_p50", "itl_p99"):
            values[address, f"block_{key}_s"] = [slower * getattr(row, key) for row in rows]
        for key in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_max"):
            values[address, f"{key}_s"] = [slower * getattr(rows[0], key)]
        values[address, "block_goodput_requests_per_s"] = [row.goodput for row in rows]
        values[address, "late_fraction"] = [0.01]
        values[address, "occupancy_fraction"] = [0.25]
        values[address, "little_off_fraction"] = [0.001]
        values[address, "budget_tokens"] = [config.layout(policy).budget]
    for case in extrapolation.map_cases(config):
        good = case.prompt > 8 * case.output
        values["simulated/winner_map", f"{case.key}_ratio"] = [1.2, 1.1] if good else [0.6, 0.7]
    for key, value in changes.items():
        variant, _, name = key.partition("__")
        for address in times:
            if address.endswith(variant):
                values[address, name] = value
    return Recorded(config, HOST, {"default": times}, values=values)


def verdicts(found):
    return [claim.holds(found) for claim in CLAIMS]


# --- predictions -------------------------------------------------------------------------------------


def test_every_policy_is_predicted_with_its_numbers_and_a_suspect():
    found = LAB.predict(QUICK, HOST)
    for policy in POLICIES:
        keys = {each.key for each in found if each.variant == f"{LIVE}/{policy}"}
        assert keys == {"time_s", "ttft_p50_s", "itl_p50_s"}
    assert all(each.because and each.suspect and each.value > 0 for each in found)
    assert {each.key for each in found if not each.variant} == {
        f"{policy}_{key}_ratio" for policy in POLICIES for key in derived.MEDIANS
    }


def test_the_formulas_count_the_models_matrices():
    config = Config(width=128, layers=3)
    model = serving_model(128, 3, 64)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name
    )
    assert numbers_in_matrices(config) == matrices
    costs = costs_of(config, HOST)
    activations = 4 * 3 * (14 * 128 + 4 * 344)
    token = 2 * matrices / 50e9 + 2 * activations / HOST.bandwidth(config.prompt * activations / 3)
    assert costs.decodes == pytest.approx(token)
    assert costs.new == pytest.approx(token + activations * HOST["page_fault_s_per_byte"])
    assert costs_of(replace(config, workers=4), HOST).new == pytest.approx(2 * costs.new)  # two to a core


def test_derived_ratios_are_measured_over_simulated():
    exact = {each.key: each.interval for each in LAB.derive(results())}
    assert set(exact) == {f"{policy}_{key}_ratio" for policy in POLICIES for key in derived.MEDIANS}
    assert all(each.value == pytest.approx(1.0) for each in exact.values())
    off = {each.key: each.interval.value for each in LAB.derive(results(slower=1.3))}
    assert all(value == pytest.approx(1.3) for value in off.values())


def test_nothing_is_derived_where_calibration_was_refused_or_the_load_was_late():
    assert LAB.derive(results(refused=True)) == []
    late = {each.key for each in LAB.derive(results(chunked__late_fraction=[0.06]))}
    assert late == {
        f"{policy}_{key}_ratio" for policy in POLICIES if policy != "chunked" for key in derived.MEDIANS
    }


# --- claims ------------------------------------------------------------------------------------------


def test_claims_hold_where_they_should():
    stalls = dict(
        prefill_first__block_itl_max_s=[0.05, 0.06, 0.055],
        chunked__block_itl_max_s=[0.02, 0.025, 0.03],
        disaggregated__block_itl_max_s=[0.01, 0.012, 0.02],
    )
    assert verdicts(results(**stalls)) == [True] * len(CLAIMS)


@pytest.mark.parametrize(
    ("index", "changes", "verdict"),
    [
        (0, dict(prefill_first__block_itl_max_s=[0.05] * 3, chunked__block_itl_max_s=[0.06] * 3), False),
        (0, dict(prefill_first__block_itl_max_s=[0.05, 0.07], chunked__block_itl_max_s=[0.06] * 3), None),
        (0, dict(prefill_first__block_itl_max_s=[0.004] * 3, chunked__block_itl_max_s=[0.02] * 3), None),
        (0, dict(chunked__late_fraction=[0.06]), None),
        (0, dict(chunked__budget_tokens=[256]), None),
        (
            1,
            dict(prefill_first__block_itl_max_s=[0.05] * 3, disaggregated__block_itl_max_s=[0.06] * 3),
            False,
        ),
        (2, dict(chunked__little_off_fraction=[0.2]), False),
        (2, dict(chunked__little_off_fraction=[]), None),
        (3, dict(winner_map__prompt64_output96_loose_ratio=[1.3, 1.2]), False),
        (3, dict(winner_map__prompt64_output96_loose_ratio=[0.8, 1.2]), None),
        (4, dict(winner_map__prompt64_output96_loose_ratio=[2.0, 1.9]), False),
    ],
)
def test_claims_can_fail_and_can_be_undecided(index, changes, verdict):
    assert verdicts(results(**changes))[index] is verdict


def test_without_results_nothing_is_claimed():
    nothing = Recorded(QUICK, HOST, {"default": {}})
    assert verdicts(nothing) == [None] * len(CLAIMS)
    assert LAB.figure(nothing) == []
    assert LAB.derive(nothing) == []


# --- figures and settings ----------------------------------------------------------------------------


def test_figures_hold_their_numbers():
    sweep = {f"sweeps__{name}_{key}": [1.0, 2.0] for name in drawn.AXES for key in (
        "x", "colocated_requests_per_s", "disaggregated_requests_per_s")}  # fmt: skip
    config = configure(LAB, "normal", {"requests": 40})
    found = LAB.figure(results(config, **sweep))
    assert len(found) == 7 + len(drawn.AXES)
    titles = [each.title for each in found]
    assert len(set(titles)) == len(titles)
    for each in found:
        again = figures.to_json(figures.from_json(json.loads(json.dumps(figures.to_json(each)))))
        assert json.dumps(again) == json.dumps(figures.to_json(each))
    told = next(each for each in found if each.title.startswith("Medians"))
    assert told.series["measured"] == pytest.approx(told.series["simulated"], rel=0.2)
    refused = LAB.figure(results(refused=True, calibration__refused=[1.0]))
    assert "Not simulated: calibration was refused" in refused[0].note
    late = LAB.figure(results(chunked__late_fraction=[0.06]))
    assert "Void, the load generator was late: chunked" in late[0].note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 1}, "workers=1 is below the minimum of 2"),
        ({"prefill": 2}, "prefill=2 of workers=2 leave nobody to write"),
        ({"rate": -3}, "rate=-3.0 is below the minimum"),
        ({"rate": "1e9"}, "is above the maximum"),
        ({"rate": "nan"}, "is not a finite number"),
        ({"itl_ms": 0}, "itl_ms=0.0 is below the minimum"),
        ({"prompt": 2000}, "a prompt of 3000 and 36 more tokens do not fit the context of 1024"),
        ({"blocks": 10}, "and the 160 tokens of the cache"),
        ({"width": 100}, "width=100 is no multiple of 64"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(LAB, "quick", settings)


def test_without_ray_every_variant_says_so(monkeypatch):
    from labs.concurrency import cluster

    monkeypatch.setattr(cluster, "unavailable", lambda: "Ray is not installed")
    assert {variant.unavailable for variant in LAB.variants(QUICK)} == {"Ray is not installed"}


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('serving');"
        "lab.variants(configure(lab, 'quick')); import labs.serving.serve;"
        "print([n for n in ('torch', 'numpy', 'ray', 'starlette', 'uvicorn') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
