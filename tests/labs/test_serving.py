"""The serving lab: predictions, claims that can fail, figures, settings."""

import functools
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from stated import Stated, machine

from bench.results import LabResults
from labs import figure as figures
from labs import load
from labs.lab import Interval, configure
from labs.serving import derived, extrapolation
from labs.serving import figures as drawn
from labs.serving.claims import CLAIMS
from labs.serving.config import Config
from labs.serving.costs import Costs, Fitted, Wires
from labs.serving.layout import POLICIES
from labs.serving.model import ACTOR_CALL_S, LIVE, costs_of, numbers_in_matrices, simulated, wires_of
from labs.serving.weights import serving_model

LAB = load("serving")
QUICK = configure(LAB, "quick")
HOST = machine(process_switch_s=1e-5, thread_switch_s=3e-5)
COSTS = Costs(2e-3, 1e-3, 1e-4, 1e-7, 5e-8, 1e-3, 4e-4, 1e-6)
WIRES = Wires(1e-3, 2e-3, 5e-4, 1e-9, 3e-3, 2e-9)
BLOCKS = 3


@functools.cache
def simulated_blocks(config, policy):
    """What most tests begin with, and a third of a second each time."""
    return [simulated(config, policy, block, Fitted(COSTS, WIRES)) for block in range(1, BLOCKS + 1)]


def results(config=QUICK, refused=False, slower=1.0, **changes):
    """Live blocks as the simulator says, times ``slower``; calibration; a winner map."""
    times = {variant.address: 1.0 for variant in LAB.variants(config)}
    values = {}
    if not refused:
        for prefix, costs in (("cost", COSTS), ("wire", WIRES)):
            for name, value in asdict(costs).items():
                values[derived.CALIBRATION, f"{prefix}_{name}_s"] = [value]
    for name in ("alone", "together"):
        values[f"neighbours/{name}", "round_decode_step_s"] = [0.001]
    for policy in POLICIES:
        address = f"{LIVE}/{policy}"
        rows = simulated_blocks(config, policy)
        for key in ("ttft_p50", "itl_p50", "itl_p99", "itl_max"):
            values[address, f"block_{key}_s"] = [slower * getattr(row, key) for row in rows]
        for key in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_max"):
            values[address, f"{key}_s"] = [slower * getattr(rows[0], key)]
        values[address, "block_met_requests_per_s"] = [row.met for row in rows]
        values[address, "late_fraction"] = [0.01]
        values[address, "occupancy_fraction"] = [0.25]
        values[address, "little_off_fraction"] = [0.001]
        values[address, "budget_tokens"] = [config.layout(policy).budget]
    for case in extrapolation.map_cases(config):
        few = [12.0, 22.0] if case.prompt > 100 else [11.0, 21.0]
        many = [13.0, 24.0] if case.prompt > 100 else [6.0, 14.0]
        values["simulated/winner_map", f"{case.key}_colocated_requests_per_s"] = [10.0, 20.0]
        apart = few if case.output < 10 else many
        values["simulated/winner_map", f"{case.key}_disaggregated_requests_per_s"] = apart
    for key, value in changes.items():
        variant, _, name = key.partition("__")
        for address in times:
            if address.endswith(variant):
                values[address, name] = value
    return Stated(config, HOST, {"default": times}, values=values)


WRITING = "winner_map__prompt64_output96_loose_disaggregated_requests_per_s"


def verdicts(found):
    return [claim.holds(found) for claim in CLAIMS]


# --- predictions -------------------------------------------------------------------------------------


def test_every_policy_is_predicted_with_its_numbers_and_a_suspect():
    found = LAB.predict(QUICK, HOST)
    for policy in POLICIES:
        keys = {each.key for each in found if each.variant == f"{LIVE}/{policy}"}
        assert not keys  # a block's time is its arrivals'
    assert all(each.because and each.suspect and each.value > 0 for each in found)
    assert {each.key for each in found} == {
        f"{policy}_{key}_{unit}" for policy in POLICIES for key in derived.MEDIANS for unit in ("s", "ratio")
    }


def test_the_formulas_count_the_models_matrices():
    config = Config(width=128, layers=3)
    model = serving_model(128, 3, 64)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name
    )
    assert numbers_in_matrices(128, 3) == matrices
    costs = costs_of(config, HOST)
    activations = 4 * 3 * (14 * 128 + 4 * 344)
    token = 2 * matrices / 50e9 + 2 * activations / HOST.bandwidth(config.prompt * activations / 3)
    assert costs.decodes == pytest.approx(token)
    assert costs.new == pytest.approx(token + activations * HOST["page_fault_s_per_byte"])
    assert costs_of(replace(config, workers=4), HOST).new == pytest.approx(2 * costs.new)  # two to a core


def test_requests_and_tokens_go_over_a_socket_and_hand_overs_through_actor_calls():
    wires = wires_of(HOST)
    assert (wires.submit, wires.deliver) == (pytest.approx(4e-5), 1e-5)
    assert wires.travel == 2 * ACTOR_CALL_S


def test_derived_ratios_are_measured_over_simulated():
    exact = ratios(results())
    assert set(exact) == {f"{policy}_{key}_ratio" for policy in POLICIES for key in derived.MEDIANS}
    assert all(value == pytest.approx(1.0) for value in exact.values())
    assert all(value == pytest.approx(1.3) for value in ratios(results(slower=1.3)).values())


def ratios(found):
    return {each.key: each.interval.value for each in LAB.derive(found) if each.key.endswith("_ratio")}


def test_derived_medians_have_the_range_of_their_blocks():
    changed = results(chunked__block_ttft_p50_s=[0.3, 0.1, 0.2])
    found = {each.key: each.interval for each in LAB.derive(changed)}
    assert found["chunked_ttft_p50_s"] == Interval(0.2, 0.1, 0.3)
    assert {each.key for each in LAB.predict(QUICK, HOST)} == set(found)


def test_a_neighbour_costs_what_a_step_takes_longer_beside_it():
    found = results(
        alone__round_decode_step_s=[0.002, 0.001, 0.002], together__round_decode_step_s=[0.003, 0.004, 0.003]
    )
    assert derived.penalty(found) == Interval(1.5, pytest.approx(1.5), pytest.approx(4.0))
    assert derived.penalty(results(alone__round_decode_step_s=[])) is None


def test_blocks_without_gaps_are_in_no_ratio(monkeypatch):
    """Where everybody writes one token there is nothing to divide by, and the other figures stay."""
    found = results()
    silent = [replace(row, itl_p50=0.0) for row in derived.in_simulator(found, "chunked")]
    monkeypatch.setattr(derived, "in_simulator", lambda results, policy: silent)
    assert set(ratios(found)) == {f"{policy}_ttft_p50_ratio" for policy in POLICIES}


def test_nothing_is_derived_where_calibration_was_refused_or_the_load_was_late():
    assert ratios(results(refused=True)) == {}
    late = {each.key for each in LAB.derive(results(chunked__late_fraction=[0.06]))}
    assert late == {
        f"{policy}_{key}_{unit}"
        for policy in POLICIES
        if policy != "chunked"
        for key in derived.MEDIANS
        for unit in ("s", "ratio")
    }


def real(found):
    """The same values in ``bench``'s own results."""
    addresses = [variant.address for variant in LAB.variants(found.config)]
    benchmarks = [
        {
            "stats": {"data": [1.0]},
            "extra_info": {
                "lab": "serving",
                "variant": address,
                "allocator": "default",
                "recorded": {
                    name: row for (variant, name), row in found.values.items() if variant == address
                },
            },
        }
        for address in addresses
    ]
    return LabResults(LAB, found.config, HOST, benchmarks)


def test_on_a_busy_host_figures_and_claims_are_there_without_what_calibration_would_tell():
    refused = real(results(refused=True, calibration__refused=[1.0]))
    whole = real(results())
    assert {each.title for each in LAB.figure(whole)} - {each.title for each in LAB.figure(refused)} == {
        "Medians measured, simulated with fitted costs, and from the machine's constants"
    }
    assert len(LAB.figure(refused)) >= 4
    assert "calibration was refused" in LAB.figure(refused)[0].note
    assert verdicts(refused) == verdicts(whole)
    assert {each.key for each in LAB.derive(refused)} == {
        f"{policy}_{key}_s" for policy in POLICIES for key in derived.MEDIANS
    }
    nothing = LabResults(LAB, QUICK, HOST, [])
    assert (list(LAB.figure(nothing)), LAB.derive(nothing)) == ([], [])


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
        (3, {WRITING: [13.0, 24.0]}, False),
        (3, {WRITING: [8.0, 24.0]}, None),
        (3, {WRITING.replace("disaggregated", "colocated"): [0.0, 20.0]}, None),  # nothing to divide by
        (4, {WRITING: [20.0, 38.0]}, False),
        (4, {WRITING: [11.0, 25.0]}, None),
        (4, {WRITING.replace("96", "8"): [13.0, 24.0]}, True),  # of the shortest outputs nothing is claimed
    ],
)
def test_claims_can_fail_and_can_be_undecided(index, changes, verdict):
    assert verdicts(results(**changes))[index] is verdict


def test_without_results_nothing_is_claimed():
    nothing = Stated(QUICK, HOST, {"default": {}})
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
        ({"output": 1}, "output=1 is below the minimum of 2"),
        (
            {"context": 40, "prompt": 10, "output": 4},
            "context=40 and blocks=512 leave no room for 8 sequences",
        ),
        ({"blocks": 40}, "a context of that many and 48 blocks"),
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
