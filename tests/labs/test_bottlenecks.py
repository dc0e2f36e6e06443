"""The bottlenecks lab: faults that change no result, fixes that undo them, claims on stated profiles."""

import math
import resource
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stated import Stated, machine

from labs.bottlenecks import LAB, Config, faults, unfused
from labs.bottlenecks.claims import (
    foretold,
    gains_are_foretold,
    healthy_is_healthy,
    holds_less,
    mended,
    named_right,
)
from labs.bottlenecks.job import Job, Run
from labs.bottlenecks.model import REACHED, healthy, predict, seconds
from labs.bottlenecks.proof import check
from labs.bottlenecks.ranks import eager_exchange, even_shares, late_exchange, shares, uneven_shares
from labs.bottlenecks.ways import HEALTHY, PAIRS, RANKED
from labs.lab import configure

GROUPS = (*PAIRS, *RANKED)
SMALL = Config(
    width=64, layers=1, heads=2, sequences=4, length=16, pieces=8, read_ms=1.0, python_passes=1, threads=2
)
CONSTANTS = dict.fromkeys(
    (
        "process_switch_s",
        "thread_switch_s",
        "python_item_s",
        "python_call_s",
        "python_operation_s",
        "pickle_item_s",
    ),
    1e-8,
) | {"libm_exp_s": 1e-8, "pipe_s_per_byte": 1e-9, "thread_switch_s": 1e-4}


def ended(job):
    """The proof of a job, which is closed."""
    run = Run(job)
    try:
        return run()
    finally:
        run.close()


# --- faults and fixes compute the same ---------------------------------------------------------------


@pytest.mark.parametrize("group", PAIRS)
def test_a_fault_and_its_fix_train_as_a_plain_float64_job(group):
    if reason := PAIRS[group].missing():
        pytest.skip(reason)
    outputs = {}
    for name, plant in (("fault", PAIRS[group].fault), ("fixed", PAIRS[group].fixed)):
        job = Job(SMALL)
        plant(job)
        outputs[f"{group}/{name}"] = ended(job)
    for found in check(SMALL, outputs):
        assert found.passed, found


def test_the_check_sees_a_job_that_trains_otherwise():
    job = Job(SMALL)
    job.optimizer.param_groups[0]["lr"] *= 3
    (found,) = check(SMALL, {HEALTHY: ended(job)})
    assert not found.passed


def proof_on_rank(name):
    from labs.bottlenecks import ranks

    job = Job(SMALL)
    getattr(ranks, name)(job)
    return ended(job).tolist()


@pytest.mark.parametrize("plant", [eager_exchange, late_exchange, uneven_shares, even_shares])
def test_ranks_together_train_as_one(ranks, plant):
    first, second = ranks.run(2, proof_on_rank, plant.__name__, backend="gloo")
    assert first == pytest.approx(second, abs=1e-12)
    for found in check(SMALL, {"communication/fault": first}):
        assert found.passed, found


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_operations_written_out_are_torchs(shape):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:]))
    functional = torch.nn.functional
    mine, theirs = unfused.layer_norm(x, shape[-1:], weight, bias, 1e-5), functional.layer_norm
    torch.testing.assert_close(mine, theirs(x, shape[-1:], weight, bias, 1e-5))
    torch.testing.assert_close(unfused.gelu(x), functional.gelu(x))
    targets = torch.randint(shape[-1], shape[:-1])
    theirs = functional.cross_entropy(x.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(unfused.cross_entropy(x, targets), theirs)


def test_what_a_job_changed_of_the_process_is_as_before():
    before = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_RSS)
    for plant in (faults.many_threads, faults.kept_activations):
        job = Job(SMALL)
        plant(job)
        run = Run(job)
        run()
        assert (torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_RSS)) != before
        run.close()
        assert (torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_RSS)) == before


@given(sequences=st.integers(8, 200), ranks=st.integers(2, 8), uneven=st.integers(1, 16))
def test_shares_are_the_whole_and_the_last_is_the_largest(sequences, ranks, uneven):
    found = shares(sequences, ranks, uneven)
    assert (sum(found), len(found)) == (sequences, ranks)
    assert min(found) >= 1
    assert max(found) == found[-1]
    if uneven == 1:
        assert found[-1] - found[0] < ranks


# --- settings and predictions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"width": "36"}, "width=36 is no multiple of 16"),
        ({"pieces": "3"}, "pieces=3 must divide the 1024 tokens"),
        ({"spare": "0.5"}, "spare=0.5 is below the minimum"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given_, said):
    with pytest.raises(ValueError, match=said):
        configure(LAB, "quick", given_)


def test_each_variant_has_a_time_and_what_is_missing_a_reason():
    config = configure(LAB, "quick")
    found = {prediction.variant: prediction for prediction in predict(config, machine(**CONSTANTS))}
    assert set(found) == {HEALTHY, *(f"{group}/{name}" for group in GROUPS for name in ("fault", "fixed"))}
    assert all(0 < prediction.value < 60 and prediction.suspect for prediction in found.values())
    variants = {variant.address: variant for variant in LAB.variants(config)}
    assert set(found) <= set(variants)
    assert variants["transfer_synchronization/fault"].unavailable
    assert {
        variant.processes for address, variant in variants.items() if address.split("/")[0] in RANKED
    } == {2}


def test_every_fault_is_predicted_to_cost_time_but_the_one_of_memory():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    for group in GROUPS:
        fault, fixed = (seconds(config, here, f"{group}/{name}").total for name in ("fault", "fixed"))
        assert (fault < fixed) if group == "memory_capacity" else (fault > fixed), group


def test_a_step_is_its_products_its_bytes_and_its_calls():
    """With a peak, a bandwidth and calls that cost nothing but one of them, each is seen alone."""
    config = configure(LAB, "quick")
    here = machine(**CONSTANTS | {"torch_call_s": 0.0})
    slower = machine(**CONSTANTS | {"torch_call_s": 0.0, "matrix_bfloat16_1_flops": 50e9})
    from labs.models.formulas import flops_per_token

    flops = flops_per_token(config.gpt(), config.length) * config.tokens
    assert healthy(config, slower) - healthy(config, here) == pytest.approx(
        flops / REACHED * (1 / 50e9 - 1 / 100e9)
    )


# --- claims ------------------------------------------------------------------------------------------


@dataclass
class Diagnosed(Stated):
    """Stated times, and what was said of each variant's profile."""

    said: dict = field(default_factory=dict)

    def info(self, variant, key, default=None):
        return self.said.get(variant, default) if key == "diagnosis" else default


def said(bottleneck, share=0.5, load=0.5, memory=0.5, memory_B=5e7):
    facts = {"load": load, "cores": 2, "memory": memory, "memory_B": memory_B}
    evidence = [{"cause": bottleneck, "share": share}]
    return {"bottleneck": bottleneck, "sure": "clear", "facts": facts, "evidence": evidence}


def results(wrong=(), load=0.5, **times):
    addresses = [HEALTHY, *(f"{group}/{name}" for group in GROUPS for name in ("fault", "fixed"))]
    found = {f"{group}/fault": said("python" if group in wrong else group, load=load) for group in GROUPS}
    taken = dict.fromkeys(addresses, 1.0) | times
    return Diagnosed(configure(LAB, "quick"), machine(), {"default": taken}, said=found)


def test_one_wrong_name_in_ten_is_allowed_two_are_not():
    assert named_right(results()) is True
    assert named_right(results(wrong=("dispatch",))) is True
    assert named_right(results(wrong=("dispatch", "input"))) is False


def test_a_wrong_name_where_other_programs_had_the_cores_decides_nothing():
    assert named_right(results(wrong=("dispatch", "input"), load=9.0)) is True
    assert named_right(Diagnosed(configure(LAB, "quick"), machine(), {"default": {}})) is None


@pytest.mark.parametrize(
    ("name", "load", "verdict"), [("none", 0.5, True), ("python", 0.5, False), ("python", 9.0, None)]
)
def test_the_healthy_job(name, load, verdict):
    found = results()
    found.said[HEALTHY] = said(name, load=load)
    assert healthy_is_healthy(found) is verdict


def test_gains_are_held_against_what_the_profile_foretold():
    found = results(**{"input/fault": 2.0, "python/fault": 2.1})
    assert foretold(found, "input") == pytest.approx(2.0)
    assert gains_are_foretold(found) is True
    assert gains_are_foretold(results(**{"input/fault": 9.0, "python/fault": 2.1})) is False


def test_a_fix_that_is_slower_fails_but_where_other_programs_had_the_cores():
    slower = results(**{"python/fixed": 2.0})
    assert [mended(group)(slower) for group in ("input", "python")] == [False, False]
    assert mended("python")(results(**{"python/fault": 2.0})) is True
    slower.said["python/fixed"] = said("none", load=9.0)
    assert mended("python")(slower) is None


def test_memory_is_compared_by_what_a_step_took_of_it():
    found = results()
    assert holds_less(found) is None
    found.said |= {
        "memory_capacity/fault": said("memory_capacity", memory=0.9, memory_B=9e7),
        "memory_capacity/fixed": said("none", memory=0.99, memory_B=4e7),
    }
    assert holds_less(found) is True
    found.said["memory_capacity/fixed"] = said("none", memory=0.4, memory_B=8.9e7)
    assert holds_less(found) is False


def test_the_picture_shows_every_fault_that_ran():
    found = results()
    gains, marks = LAB.figure(replace(found, said=found.said | {HEALTHY: said("none")}))
    assert len(gains.labels) == len(GROUPS)
    assert all(math.isfinite(value) for value in gains.series["measured"])
    assert marks.labels[0] == HEALTHY
