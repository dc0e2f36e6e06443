"""The bottlenecks lab: faults that change no result, fixes that undo them, claims on stated profiles."""

import itertools
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from stated import GLOO, Stated, machine

from labs.bottlenecks import LAB, Config, allocator, device, faults, unfused
from labs.bottlenecks.claims import (
    FEWEST,
    fixed_is_not_named,
    foretold,
    gains_are_foretold,
    healthy_is_healthy,
    holds_less,
    mended,
    named_right,
)
from labs.bottlenecks.job import Job, Run, best_precision
from labs.bottlenecks.model import derive, healthy, predict, seconds
from labs.bottlenecks.proof import check, precision_of
from labs.bottlenecks.ranks import eager_exchange, even_shares, late_exchange, shares, uneven_shares
from labs.bottlenecks.ways import HEALTHY, ON_DEVICE, PAIRS, RANKED, setup_of
from labs.lab import configure, find
from labs.training_seconds import Batch, backward, bandwidth, forward, update

GROUPS = (*PAIRS, *RANKED)
SMALL = Config(
    width=64, layers=1, heads=2, sequences=4, length=16, pieces=8, read_ms=1.0, python_passes=1, threads=2
)
CONSTANTS = (
    dict.fromkeys(
        (
            "python_item_s",
            "python_call_s",
            "python_operation_s",
            "python_step_s",
            "python_function_s",
            "pickle_item_s",
        ),
        1e-8,
    )
    | GLOO
    | {"libm_exp_s": 1e-8, "packed_exp_s": 1e-10, "process_switch_s": 1e-4}
)


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


@pytest.mark.parametrize("first", [0, 1])
def test_jobs_that_overlap_leave_the_process_as_it_was_whoever_ends_first(first):
    """As a group's variants do, and all labs of a run share one process."""
    before = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_RSS)
    for plants in (
        (faults.many_threads, faults.a_thread_a_free_core),
        (faults.kept_activations, faults.recomputed_activations),
    ):
        runs = [setup_of(plant)(SMALL, None) for plant in plants]
        for _ in range(2):
            for run in runs:
                run()
        runs.pop(first).close()
        runs[0]()
        runs[0].close()
        assert (torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_RSS)) == before


def test_a_job_that_cannot_be_set_up_leaves_the_process_as_it_was():
    def fails(job):
        job.threads = 5
        job.step()
        raise ValueError("planted")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="planted"):
        setup_of(fails)(SMALL, None)
    assert torch.get_num_threads() == before


KEPT = """
import resource
import torch
from labs.bottlenecks import allocator

def faults_of(between, count=20, size=8 << 20):
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(size // 4)
        between()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

nothing = lambda: None
faults_of(nothing)
kept = faults_of(nothing)
given = faults_of(allocator.give_back)
faults_of(nothing)
print(kept, given, faults_of(nothing))
"""


@pytest.mark.skipif(bool(allocator.missing()), reason="not glibc")
def test_memory_is_faulted_in_again_where_it_is_given_back_and_nowhere_else():
    """In a process that was started as the lab's column is. 8 MiB are 2048 pages, fewer if huge."""
    from bench.environment import allocator_environment

    (column,) = LAB.columns
    environment = allocator_environment(column) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(
        [sys.executable, "-c", KEPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    kept, given, after = map(int, said.stdout.split())
    assert given > 19 * 4
    assert max(kept, after) < given / 10


def test_shares_are_the_whole_and_the_last_is_the_largest():
    for sequences, ranks, uneven in itertools.product(range(8, 201), range(2, 9), range(1, 17)):
        found = shares(sequences, ranks, uneven)
        assert (sum(found), len(found)) == (sequences, ranks)
        assert min(found) >= 1
        assert max(found) == found[-1]
        if uneven == 1:
            assert found[-1] - found[0] <= 1


@pytest.mark.gpu
def test_on_a_device_the_fault_is_named_and_its_fix_is_not(tmp_path):
    """Both train as the float64 job, too."""
    from bench.clocks import clock
    from bench.diagnosis.verdict import diagnose
    from bench.measure import RoundRecorder
    from bench.profile.steps import record
    from bench.traces.load import load

    if reason := device.missing():
        pytest.skip(reason)
    config, waits, named = configure(LAB, "quick"), clock("cuda"), {}
    for name in ("fault", "fixed"):
        address = f"transfer_synchronization/{name}"
        step = find(LAB, config, address).setup(config, RoundRecorder())
        try:
            for _ in range(3):
                waits.wait(output := step())
            path = tmp_path / f"{name}.json.gz"
            record(step, config.profiled, path, wait=waits.wait)
        finally:
            step.close()
        (found,) = check(config, {address: output})
        assert found.passed, found
        said = diagnose(load(path))
        assert said.facts.on_device
        named[name] = said.bottleneck
    assert named["fault"] == "transfer_synchronization"
    assert named["fixed"] != "transfer_synchronization"


# --- settings and predictions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"width": "36"}, "width=36 is no multiple of 16"),
        ({"pieces": "3"}, "pieces=3 must divide the 1024 tokens"),
        ({"spare": "0.5"}, "spare=0.5 is below the minimum"),
        ({"profiled": "4"}, "profiled=4 is below the minimum of 5"),
        ({"ranks": "7"}, "sequences=8 are too few for ranks=7 .* 14 or more"),
        ({"ranks": "16"}, "sequences=8 are too few for ranks=16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given_, said):
    with pytest.raises(ValueError, match=said):
        configure(LAB, "quick", given_)


def test_each_variant_has_a_time_and_what_is_missing_a_reason():
    config = configure(LAB, "quick")
    found = {each.variant: each for each in predict(config, machine(**CONSTANTS)) if each.variant}
    assert set(found) == {HEALTHY, *(f"{group}/{name}" for group in GROUPS for name in ("fault", "fixed"))}
    assert all(0 < prediction.value < 60 and prediction.suspect for prediction in found.values())
    variants = {variant.address: variant for variant in LAB.variants(config)}
    assert set(found) <= set(variants)
    assert variants["transfer_synchronization/fault"].unavailable
    assert {
        variant.processes for address, variant in variants.items() if address.split("/")[0] in RANKED
    } == {2}


@pytest.mark.parametrize(("ranks", "uneven"), [(2, 2), (3, 4), (6, 64)])
def test_every_number_of_ranks_that_is_allowed_has_a_prediction(ranks, uneven):
    config = configure(LAB, "quick", {"ranks": str(ranks), "uneven": str(uneven)})
    assert all(each.value > 0 for each in predict(config, machine(**CONSTANTS)))
    counts = config.shares()
    assert (sum(counts), min(counts) >= 1, max(counts) > min(counts)) == (8, True, True)


def test_no_sequence_is_not_all_sequences():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    assert healthy(config, here, sequences=0) < healthy(config, here, sequences=1) < healthy(config, here)


def test_what_each_fault_costs_is_predicted_and_derived_from_its_pair():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    costs = {each.key: each.value for each in predict(config, here) if not each.variant}
    assert set(costs) == {f"{group}_cost_s" for group in GROUPS}
    assert all(value > 0 for value in costs.values())
    read = config.sequences * config.read_ms / 1e3
    assert costs["input_cost_s"] == pytest.approx(read, rel=0.2)
    measured = {
        each.key: each.interval
        for each in derive(results(**{"input/fault": 3.0, "memory_capacity/fixed": 1.5}))
    }
    assert set(measured) == set(costs)
    assert measured["input_cost_s"].value == pytest.approx(2.0)
    assert measured["input_cost_s"].low < 2.0 < measured["input_cost_s"].high < 2.1
    assert measured["memory_capacity_cost_s"].value == pytest.approx(0.5)


def test_the_tolerance_is_that_of_the_jobs_type():
    (group,) = ON_DEVICE
    assert [precision_of(f"{group}/{name}") for name in ("fault", "fixed")] == ["bfloat16", "bfloat16"]
    assert precision_of("compute_precision/fault") == "float32"
    assert precision_of(HEALTHY) == best_precision()


def test_every_fault_is_predicted_to_cost_time_but_the_one_of_memory():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    for group in GROUPS:
        fault, fixed = (seconds(config, here, f"{group}/{name}").total for name in ("fault", "fixed"))
        assert (fault < fixed) if group == "memory_capacity" else (fault > fixed), group


def test_a_number_in_a_python_loop_costs_nine_parts_of_which_one_is_half():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    count = config.python_passes * config.tokens * 256
    assert seconds(config, here, "python/fault").fault == pytest.approx(count * 8.5e-8)


def test_what_is_not_fused_crosses_memory_once_more_and_so_does_an_update_in_eight_passes():
    from labs.models.formulas import parameters

    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    batch = Batch(config.gpt(), config.sequences, config.length, "bfloat16", jobs=2)
    states = 4 * config.tokens * config.width
    moved = 2 * config.layers * (26 * 4 + 30) * states + 52 * parameters(config.gpt())
    found = seconds(config, here, "memory_bandwidth/fault").fault
    assert found == pytest.approx(moved / bandwidth(batch, here))


def test_a_batch_in_pieces_costs_every_piece_and_one_update():
    config, here = configure(LAB, "quick"), machine(**CONSTANTS)
    piece = Batch(config.gpt(), 1, config.length, "bfloat16", jobs=2)
    both = forward(piece, here).total + backward(piece, here).total
    whole = healthy(config, here, pieces=config.sequences)
    assert whole == pytest.approx(config.sequences * both + update(piece, here))
    fault, fixed = (seconds(config, here, f"memory_capacity/{name}") for name in ("fault", "fixed"))
    deep = replace(config, layers=2 * config.layers)
    again = forward(Batch(deep.gpt(), config.sequences, config.length, "bfloat16", jobs=2), here).total
    assert fixed.total - fault.total == pytest.approx(again)


# --- claims ------------------------------------------------------------------------------------------


@dataclass
class Diagnosed(Stated):
    """Stated times, and what was said of each variant's profile."""

    said: dict = field(default_factory=dict)

    def info(self, variant, key, default=None):
        return self.said.get(variant, default) if key == "diagnosis" else default


def said(bottleneck, share=0.5, load=0.5, memory=0.5, memory_B=5e7):
    facts = {"load": load, "cores": 2, "memory": memory, "memory_B": memory_B}
    evidence = [{"cause": bottleneck, "share": share, "gain": 1 / (1 - share)}]
    return {"bottleneck": bottleneck, "sure": "clear", "facts": facts, "evidence": evidence}


def results(wrong=(), busy=(), **times):
    """wrong: groups whose fault is called another. busy: groups beside whose jobs other programs ran."""
    addresses = [HEALTHY, *(f"{group}/{name}" for group in GROUPS for name in ("fault", "fixed"))]
    loads = {group: 9.0 if group in busy else 0.5 for group in GROUPS}
    found = {
        f"{group}/fault": said("other" if group in wrong else group, load=loads[group]) for group in GROUPS
    }
    found |= {f"{group}/fixed": said("none", load=loads[group]) for group in GROUPS}
    taken = dict.fromkeys(addresses, 1.0) | times
    return Diagnosed(configure(LAB, "quick"), machine(), {"default": taken}, said=found)


def test_one_wrong_name_in_ten_is_allowed_two_are_not():
    assert named_right(results()) is True
    assert named_right(results(wrong=("dispatch",))) is True
    assert named_right(results(wrong=("dispatch", "input"))) is False


def test_names_beside_other_programs_count_neither_way():
    assert named_right(results(wrong=("dispatch", "input"), busy=("dispatch", "input"))) is True
    assert named_right(results(wrong=("dispatch",), busy=("input", "python"))) is False  # 7 of 8
    assert named_right(results(busy=GROUPS[: len(GROUPS) - FEWEST + 1])) is None  # 7 left, all right
    assert named_right(results(wrong=GROUPS, busy=GROUPS)) is None
    assert named_right(Diagnosed(configure(LAB, "quick"), machine(), {"default": {}})) is None


def test_a_mended_job_is_not_named_with_what_was_mended():
    found = results()
    assert fixed_is_not_named(found) is True
    found.said["python/fixed"] = said("dispatch")  # another cause may be left
    assert fixed_is_not_named(found) is True
    found.said["memory_capacity/fixed"] = said("memory_capacity")
    assert fixed_is_not_named(found) is False
    found.said["memory_capacity/fixed"] = said("memory_capacity", load=9.0)
    assert fixed_is_not_named(found) is True
    assert fixed_is_not_named(results(busy=GROUPS)) is None


@pytest.mark.parametrize(
    ("name", "load", "verdict"),
    [("none", 0.5, True), ("python", 0.5, False), ("python", 9.0, None), ("none", 9.0, None)],
)
def test_the_healthy_job(name, load, verdict):
    found = results()
    found.said[HEALTHY] = said(name, load=load)
    assert healthy_is_healthy(found) is verdict


def test_gains_are_held_against_what_the_profile_foretold():
    """All are foretold to be twice as fast."""
    timed = [group for group in GROUPS if group != "memory_capacity"]
    near = {f"{group}/fault": 2.0 + 0.1 * place for place, group in enumerate(timed)}
    found = results(**near)
    found.said["memory_capacity/fault"]["evidence"][0]["gain"] = None
    assert foretold(found, "input") == pytest.approx(2.0)
    assert foretold(found, "memory_capacity") is None
    assert gains_are_foretold(found) is True
    for group in timed:
        far = replace(found, columns={"default": found.times | {f"{group}/fault": 9.0}})
        assert gains_are_foretold(far) is False, group
    assert gains_are_foretold(replace(found, said={})) is None
    few = results(busy=("input", "python"), **near)
    few.said["memory_capacity/fault"]["evidence"][0]["gain"] = None
    assert gains_are_foretold(few) is None


def test_a_fix_that_is_slower_fails_but_where_other_programs_had_the_cores():
    slower = results(**{"python/fixed": 2.0})
    assert [mended(group)(slower) for group in ("input", "python")] == [False, False]
    assert mended("python")(results(**{"python/fault": 2.0})) is True
    slower.said["python/fixed"] = said("none", load=9.0)
    assert mended("python")(slower) is None
    assert mended("python")(results(busy=("python",), **{"python/fault": 2.0})) is None


def test_memory_is_compared_by_what_a_step_took_of_it():
    found = results()
    del found.said["memory_capacity/fixed"]
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
