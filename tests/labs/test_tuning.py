"""The tuning lab: trials that go on as if they had not stopped; predictions, proofs and claims can fail."""

import functools
import math
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept
from stated import Stated, machine

from labs import figure as figures
from labs import load, training_seconds
from labs.lab import configure
from labs.training_seconds import Batch
from labs.tuning import claims, curves, model, stragglers, ways
from labs.tuning.config import METHODS
from labs.tuning.running import Ended, Trace, search
from labs.tuning.schedulers.job import Job
from labs.tuning.space import draw
from labs.tuning.together import Together
from labs.tuning.training import Training, validation

LAB = load("tuning")
QUICK = configure(LAB, "quick")
SIZES = {"configurations": 9, "most_steps": 9, "least_steps": 1, "population": 4, "length": 8, "sequences": 4}
TINY = configure(LAB, "quick", SIZES)
POINT, OTHER = draw(2, 3)
pytestmark = pytest.mark.usefixtures("kept_by_jax")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- trials ----------------------------------------------------------------------------------------


def test_a_trial_that_stops_and_moves_is_one_that_did_not():
    """Bit for bit: parameters, moments and the place in the text go on; nothing of the first is changed."""
    task = TINY.task()
    whole = Training(task, POINT).advance(9)
    first = Training(task, POINT)
    begun = first.advance(4)
    state = first.state()
    kept = {name: value.clone() for name, value in state["model"].items()}
    moved = Training(task, POINT, state)
    assert begun | moved.advance(9) == whole
    assert all(torch.equal(kept[name], value) for name, value in first.state()["model"].items())
    lost = Training(task, POINT, {**first.state(), "moments": {}})
    assert lost.advance(9)[9] != whole[9]
    assert begun | first.advance(9) == whole, "nor has what went on changed where it came from"


def test_a_copied_trial_goes_on_with_its_own_point():
    """As population based training wants it."""
    task = TINY.task()
    first = Training(task, POINT)
    first.advance(4)
    state = first.state()
    copied = Training(task, OTHER, state)
    copied.advance(9)
    expected = Training(task, POINT)
    expected.advance(4)
    expected.become(OTHER)
    expected.advance(9)
    assert copied.loss() == expected.loss()
    assert copied.loss() != Training(task, POINT).advance(9)[9]


def test_a_trial_cannot_go_back():
    training = Training(TINY.task(), POINT)
    training.advance(2)
    with pytest.raises(ValueError, match="stop=1, and 2 steps are done"):
        training.advance(1)


def test_trials_of_one_vmapped_step_are_those_of_torch_in_float64():
    task = replace(TINY.task(), milestones=())
    points = draw(2, 0)  # as many as below: compiled once
    trials = Together(task, points)
    for _ in range(4):
        trials.step()
    found = trials.losses(*validation(task)).tolist()
    for point, loss in zip(points, found, strict=True):
        exact = Training(task, point, dtype=torch.float64)
        exact.advance(4)
        assert loss == pytest.approx(exact.loss(), abs=5e-4)
        assert abs(loss - Training(task, point).loss()) > 0.05, "the steps have moved it by far more"
    with pytest.raises(ValueError, match="no points"):
        Together(task, [])


# --- predictions -----------------------------------------------------------------------------------


def constants():
    stated = machine()
    more = {"process_switch_s": 2e-5, "spawn_s": 0.1, "jax_call_s": 4e-6, "vector_float32_1_flops": 250e9}
    more |= {"packed_exp_s": 2e-10}
    return replace(stated, constants={**stated.constants, **more})


def test_steps_are_those_of_the_sums():
    """27 configurations, rungs at 24, 72 and 216 steps."""
    steps = {each.variant: each.value for each in LAB.predict(QUICK, constants()) if each.key == "steps"}
    assert steps == {
        "search/random": 27 * 216,
        "search/successive_halving": 27 * 24 + 9 * 48 + 3 * 144,
        # 9, 5 and 3 trials from 24, 72 and 216 in the paper; of 27: 14, 8 and 5.
        "search/hyperband": (14 * 24 + 4 * 48 + 1 * 144) + (8 * 72 + 2 * 144) + 5 * 216,
        "search/population": 8 * 216,
    }


@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 200), st.integers(2, 5), st.integers(2, 12))
def test_sums_are_the_steps_that_schedulers_take(count, least, more, eta, members):
    sizes = dict(configurations=count, least_steps=least, most_steps=max(2, least + more), eta=eta)
    config = replace(QUICK, **sizes, population=members)
    known = [{step: 9.0 - step / 999 + trial for step in config.milestones()} for trial in range(60)]
    for name in model.EXACT:
        workers = model.SimulatedWorkers(2, known, 1.0)
        assert search(config.scheduler(name), workers).steps == model.exact_steps(config, name), name


def test_a_step_and_a_loss_are_those_of_the_model():
    """More sequences of a step make it longer and leave the loss, whose batch is its own; a job is four steps
    and its hand-overs."""
    here, task = constants(), QUICK.task()
    gpt = task.gpt()
    batches = [Batch(gpt, count, task.length, "float32") for count in (QUICK.sequences, 32)]
    assert model.step_s(task, here) == training_seconds.step(batches[0], here)
    assert model.loss_s(task, here) == training_seconds.forward(batches[1], here).total
    wide = replace(task, sequences=2 * task.sequences)
    assert model.step_s(wide, here) > model.step_s(task, here)
    assert model.loss_s(wide, here) == model.loss_s(task, here)
    hands = model.RAY_HANDS * here["process_switch_s"]
    assert model.job_s(task, here) == pytest.approx(hands + 4 * model.step_s(task, here))


def test_every_variant_has_a_predicted_time():
    said = {each.variant for each in LAB.predict(QUICK, constants()) if each.key == "time_s"}
    assert said == {variant.address for variant in LAB.variants(QUICK)}
    assert all(each.value > 0 for each in LAB.predict(QUICK, constants()))
    more = {each.variant: each.value for each in LAB.predict(replace(QUICK, workers=4), constants())}
    for each in LAB.predict(QUICK, constants()):
        if each.key == "time_s" and each.variant.startswith("search"):
            assert more[each.variant] < each.value or each.variant == "search/population", each


# --- proofs ----------------------------------------------------------------------------------------


class Local:
    """Workers that train in this process, one job at a time: what Ray's do, without Ray."""

    count = 2

    def __init__(self, task):
        self.task, self.clock, self.states, self.flying = task, 0.0, {}, []

    def now(self):
        self.clock += 1.0
        return self.clock

    def submit(self, worker, job):
        state = None if job.source is None else self.states[job.source, job.start]
        self.flying.append((worker, job, state))

    def wait(self):
        worker, job, state = self.flying.pop(0)
        training = Training(self.task, job.point, state)
        losses = training.advance(job.stop)
        self.states[job.trial, job.stop] = training.state()
        return worker, losses


@pytest.fixture(scope="module")
def searched(one_thread):
    """Every method on real trainings: (what it returns, what it records)."""
    found = {}
    for name in METHODS:
        scheduler, kept = TINY.scheduler(name), Kept()
        trace = search(scheduler, Local(TINY.task()))
        ways.record(trace, kept)
        found[name] = ways.lineage(trace, scheduler.best()[0], scheduler.most), kept.values
    return found


def test_the_best_of_every_search_is_a_training_without_a_stop(searched):
    outputs = {f"search/{name}": trained for name, (trained, _) in searched.items()}
    found = LAB.check(TINY, outputs)
    assert [check.variant for check in found] == list(outputs)
    assert all(check.passed for check in found), found
    trained = outputs["search/successive_halving"]
    assert len(trained.jobs) == 3, "it was promoted twice"
    wrong = ways.Trained(trained.jobs, [*trained.losses[:-1], trained.losses[-1] + 1e-3])
    assert not LAB.check(TINY, {"search/asha": wrong})[0].passed
    lost = ways.Trained(trained.jobs, [*trained.losses[:-1], math.nan])
    assert not LAB.check(TINY, {"search/asha": lost})[0].passed
    with pytest.raises(TypeError, match="no trial that was trained for 9 steps"):
        LAB.check(TINY, {"search/asha": None})


def test_other_groups_are_held_against_trainings_of_their_own():
    config = replace(TINY, peer_trials=2, together=2)
    whole = [Training(TINY.task(), point).advance(9)[9] for point in draw(2, 0)]
    for name in ("ray_tune", "ray_tune_reused", "warm_workers"):
        assert LAB.check(config, {f"start/{name}": whole})[0].passed
    assert not LAB.check(config, {"start/ray_tune": whole[::-1]})[0].passed
    for name in ("torch_in_turn", "jax_vmap"):  # jax_in_turn is the same with another count, compiled anew
        (variant,) = [each for each in LAB.variants(config) if each.name == name]
        step = variant.setup(config, Kept())
        found = step()
        assert LAB.check(config, {variant.address: found})[0].passed, name
        assert step() == found, "each call trains them from the beginning"
        assert not LAB.check(config, {variant.address: found[::-1]})[0].passed
    with pytest.raises(TypeError, match="no 2 losses"):
        LAB.check(config, {"start/warm_workers": whole[:1]})


def test_a_lineage_follows_a_copied_trial_to_where_it_came_from():
    jobs = [Job(0, POINT, 0, 2), Job(1, OTHER, 0, 2), Job(1, POINT, 2, 4, source=0)]
    ended = [Ended(job, 0, 0.0, 1.0, {job.stop: 5.0 - place}) for place, job in enumerate(jobs)]
    assert ways.lineage(Trace(ended, 1, 1.0), 1, 4) == ways.Trained([jobs[0], jobs[2]], [5.0, 3.0])


# --- what curves say -------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1.0, 2.0, 2.5, 3.0, math.inf]), min_size=2, max_size=12), st.randoms())
def test_rank_correlation_is_spearmans(values, generator):
    others = values[:]
    generator.shuffle(others)
    found = curves.rank_correlation(values, others)
    if len(set(values)) == 1:
        assert math.isnan(found)
    else:
        by_counting = [
            [
                sum(other < value for other in side) + sum(other == value for other in side) / 2
                for value in side
            ]
            for side in (values, others)
        ]
        assert found == pytest.approx(numpy.corrcoef(*by_counting)[0, 1])
    nan = [math.nan if math.isinf(value) else value for value in values]
    assert curves.rank_correlation(nan, others) == pytest.approx(found, nan_ok=True)


def test_losses_to_correlate_are_as_many():
    with pytest.raises(ValueError, match="1 and 2 losses"):
        curves.rank_correlation([1.0], [1.0, 2.0])


# --- claims ----------------------------------------------------------------------------------------


class Found(Stated):
    """Results whose predictions are the lab's."""

    def predicted(self, variant, key="time_s"):
        assert self.machine == constants()
        return predictions(self.config).get((variant, key))


@functools.cache
def predictions(config):
    """A tenth of a second each time, and asked for by every claim."""
    return {(each.variant, each.key): each.value for each in LAB.predict(config, constants())}


def known_ends(values, config):
    """(step, loss) of whole trainings of random search."""
    columns = (values["search/random", name] for name in ("loss_step", "loss_nats"))
    return [each for each in zip(*columns, strict=True) if each[0] == config.most_steps]


def as_hoped(**changes):
    """Curves of a known shape: slow ones end best, so that losses on the way mislead and their curves do
    not; every method simulated on them."""
    config = replace(QUICK, **changes)
    host = constants()
    task = config.task()
    known = []
    for trial in range(config.configurations):
        quality = (7 * trial) % config.configurations / config.configurations
        known.append({step: 2 + quality + (30 - 20 * quality) * step**-0.8 for step in config.milestones()})
    times, values = {}, {}
    for name in METHODS:
        kept = Kept()
        scheduler = config.scheduler(name)
        workers = model.SimulatedWorkers(
            config.workers, known, model.step_s(task, host), model.job_s(task, host)
        )
        trace = search(scheduler, workers)
        ways.record(trace, kept)
        for counted, count in scheduler.counted.items():
            kept.record(counted, count, "")
        times[f"search/{name}"] = trace.seconds
        values |= {(f"search/{name}", key): column for key, column in kept.values.items()}
        values[f"search/{name}", "cluster_start_s"] = [5.0]
        values[f"search/{name}", "workers_start_s"] = [3.0]
    for name in ways.FIDELITIES:
        times[f"fidelity/{name}"] = times["search/random"] * 0.7
        jobs = ("job_start", "job_stop", "job_begin_s", "job_end_s")
        for key in ("loss_trial", "loss_step", "loss_nats", "loss_at_s", *jobs):
            values[f"fidelity/{name}", key] = values["search/random", key]
    times["search/ray_tune_asha"] = 5 * times["search/asha"]
    values["search/ray_tune_asha", "best_nats"] = [min(loss for _, loss in known_ends(values, config))]
    times |= {"start/ray_tune": 12.0, "start/ray_tune_reused": 5.0, "start/warm_workers": 1.0}
    times |= {"together/torch_in_turn": 0.1, "together/torch_at_once": 0.06}
    times |= {"together/jax_in_turn": 0.07, "together/jax_vmap": 0.02}
    return Found(config, host, {"default": times}, values=values)


@pytest.fixture(scope="module")
def hoped():
    return as_hoped()


def test_all_claims_hold_on_curves_that_can_be_drawn_on(hoped):
    verdicts = {claim.text: claim.holds(hoped) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


def changed(results, key, column):
    return replace(results, values={**results.values, key: column})


def slower(results, **times):
    return replace(results, columns={"default": {**results.times, **times}})


def test_each_claim_can_fail(hoped):
    steps = hoped.values["search/random", "steps"][0]
    assert claims.steps_are_predicted(changed(hoped, ("search/random", "steps"), [steps + 1])) is False
    half = 0.5 * hoped.times["search/random"]
    late = [at + half for at in hoped.values["search/asha_extrapolated", "loss_at_s"]]
    late = changed(hoped, ("search/asha_extrapolated", "loss_at_s"), late)
    assert claims.extrapolation_arrives(late) is False
    far = [loss + 0.03 for loss in hoped.values["search/asha_extrapolated", "loss_nats"]]
    assert (
        claims.extrapolation_arrives(changed(hoped, ("search/asha_extrapolated", "loss_nats"), far)) is False
    )
    far = [loss + 0.2 for loss in hoped.values["search/extrapolating", "loss_nats"]]
    assert claims.giving_up_is_safe(changed(hoped, ("search/extrapolating", "loss_nats"), far)) is False
    assert claims.warm_is_faster(slower(hoped, **{"start/warm_workers": 6.0})) is None, "it may be by chance"
    assert claims.warm_is_faster(slower(hoped, **{"start/warm_workers": 30.0})) is False
    for seconds, verdict in ((0.12, False), (0.08, False), (0.07, None)):
        assert claims.together_is_faster(slower(hoped, **{"together/jax_vmap": seconds})) is verdict
    for times, verdict in ((1.5, None), (0.4, False)):
        peers = {"search/ray_tune_asha": times * hoped.times["search/asha"]}
        assert claims.own_search_is_faster(slower(hoped, **peers)) is verdict
    for name in ways.FIDELITIES:
        cheap = slower(hoped, **{f"fidelity/{name}": 0.4 * hoped.times["search/random"]})
        assert claims.cheaper_steps_cost_more_than_half(cheap) is False
    first, last = QUICK.rungs()[0], QUICK.rungs()[-2]
    swapped = [
        {first: last, last: first}.get(step, step) for step in hoped.values["search/random", "loss_step"]
    ]
    assert claims.later_rungs_rank_better(changed(hoped, ("search/random", "loss_step"), swapped)) is False
    mirrored = [
        -loss if step <= first else loss
        for loss, step in zip(
            hoped.values["search/random", "loss_nats"],
            hoped.values["search/random", "loss_step"],
            strict=True,
        )
    ]
    mirrored = changed(hoped, ("search/random", "loss_nats"), mirrored)
    assert claims.drawing_on_ranks_better(mirrored) is None, "losses rank well already"
    assert claims.drawing_on_ranks_better(misdrawn(hoped)) is False
    for name in ("successive_halving", "asha"):
        arrived = {
            (f"search/{name}", key): hoped.values["search/asha_extrapolated", key]
            for key in ("loss_trial", "loss_step", "loss_nats", "loss_at_s")
        }
        one = replace(hoped, values={**hoped.values, **arrived})
        assert claims.early_losses_mislead(one) is False, name


def misdrawn(results):
    """Losses at the first rung say nothing of the end, and the slopes up to it say the opposite."""
    config = results.config
    generator = random.Random(2)
    count = config.configurations
    order = generator.sample(range(count), count)
    known = []
    for trial in range(count):
        curve = {}
        for step in config.milestones():
            early = (
                9 + order[trial] / count + 40 * (1 - trial / count) * (step**-0.7 - config.least_steps**-0.7)
            )
            curve[step] = early if step <= config.least_steps else 2 + (1 - trial / count) + 1 / step
        known.append(curve)
    flat = [(trial, step, loss) for trial, curve in enumerate(known) for step, loss in curve.items()]
    values = {
        ("search/random", name): list(column)
        for name, column in zip(
            ("loss_trial", "loss_step", "loss_nats"), zip(*flat, strict=True), strict=True
        )
    }
    return replace(results, values={**results.values, **values})


def test_busier_workers_can_be_refuted(hoped, monkeypatch):
    swapped = {"asha": "successive_halving", "successive_halving": "asha"}
    whole = stragglers.simulated
    monkeypatch.setattr(
        stragglers, "simulated", lambda results, name, *rest: whole(results, swapped.get(name, name), *rest)
    )
    assert claims.asynchronous_is_busier(hoped) is False


def test_what_ranks_trials_alike_decides_nothing(hoped):
    """The same losses at both rungs; two trials."""
    first, last = QUICK.rungs()[0], QUICK.rungs()[-2]
    columns = (hoped.values["search/random", name] for name in ("loss_trial", "loss_step", "loss_nats"))
    of_first = {trial: loss for trial, step, loss in zip(*columns, strict=True) if step == first}
    columns = (hoped.values["search/random", name] for name in ("loss_trial", "loss_step", "loss_nats"))
    alike = [of_first[trial] if step == last else loss for trial, step, loss in zip(*columns, strict=True)]
    alike = changed(hoped, ("search/random", "loss_nats"), alike)
    assert claims.later_rungs_rank_better(alike) is None
    two = as_hoped(configurations=2, population=2)
    assert claims.later_rungs_rank_better(two) is None
    assert claims.drawing_on_ranks_better(two) is None


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=5, max_size=20))
def test_an_interval_of_rank_correlations_is_around_their_difference_and_turns_with_it(rows):
    new, base, end = (list(column) for column in zip(*rows, strict=True))
    found, turned = curves.closer(new, base, end), curves.closer(base, new, end)
    if math.isfinite(found.low):
        assert found.low <= found.high
        assert turned.low == pytest.approx(-found.high)
        assert turned.high == pytest.approx(-found.low)
    assert curves.closer(new, new, end).high in (0.0, math.inf)


def test_of_a_few_trials_a_small_difference_in_rank_is_by_chance_and_a_large_one_is_not():
    end = [float(trial) for trial in range(9)]
    near, nearer = [1.0, 0.0, *end[2:]], [1.0, 0.0, 3.0, 2.0, *end[4:]]
    small = curves.closer(near, nearer, end)
    assert small.value == pytest.approx(2 / 120)  # 6 / (9 x 80) of the sums of squares, 4 - 2
    assert small.low <= 0 < small.high
    large = curves.closer(near, end[::-1], end)
    assert 0 < large.low < large.value < large.high


def test_a_searchs_share_of_time_is_as_sure_as_its_jobs_are_alike(hoped):
    """Job times that vary by more widen the interval; the value is that of both searches' seconds."""
    address = "search/extrapolating"
    share = curves.share_of_random(hoped, address)
    assert share.value == hoped.times[address] / hoped.times["search/random"]
    assert share.low < share.value < share.high < 1.3 * share.low
    begins, ends = (hoped.values[address, name] for name in ("job_begin_s", "job_end_s"))
    uneven = [
        begin + (end - begin) * (5 if place % 4 == 0 else 0.2)
        for place, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    wider = curves.share_of_random(changed(hoped, (address, "job_end_s"), uneven), address)
    assert wider.high - wider.low > 3 * (share.high - share.low)
    assert curves.share_of_random(Found(QUICK, constants(), {}), address) is None


def test_where_the_first_rung_hides_the_winner_nothing_is_claimed(hoped):
    """The winner's losses up to the first rung are those of the worst."""
    config = hoped.config
    whole = curves.whole_curves(hoped)
    winner = min(range(len(whole)), key=lambda trial: whole[trial][config.most_steps])
    columns = (hoped.values["search/random", name] for name in ("loss_trial", "loss_step", "loss_nats"))
    hidden = [
        9.0 + step if trial == winner and step <= config.least_steps else loss
        for trial, step, loss in zip(*columns, strict=True)
    ]
    results = changed(hoped, ("search/random", "loss_nats"), hidden)
    assert claims.kept(hoped)
    assert not claims.kept(results)
    assert claims.extrapolation_arrives(results) is None


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:40])
def test_nothing_measured_decides_nothing(claim):
    assert claim.holds(Found(QUICK, constants(), {})) is None


def test_stragglers_hold_up_who_waits(hoped):
    assert stragglers.busier(hoped, "asha", "successive_halving").low > 1
    faster = stragglers.times_as_fast(hoped, "asha", "successive_halving")
    pairs = [
        [stragglers.simulated(hoped, name, seed).seconds for name in ("successive_halving", "asha")]
        for seed in range(stragglers.DRAWS)
    ]
    assert faster.value == pytest.approx(sum(full / mine for full, mine in pairs) / len(pairs))
    early = stragglers.simulated(hoped, "asha", 0, late=False)
    assert stragglers.simulated(hoped, "asha", 0).seconds > early.seconds


def test_regret_and_time_to_target_are_those_of_the_records(hoped):
    key = ("search/random", "loss_nats")
    best = min(curves.ends(hoped, "search/random"), key=lambda end: end[1])
    assert curves.regret(hoped, "search/random") == 0.0
    assert curves.time_to_target(hoped, "search/random") <= best[0]
    worse = changed(hoped, ("search/asha", key[1]), [9.0] * len(hoped.values["search/asha", key[1]]))
    assert curves.time_to_target(worse, "search/asha") is None
    assert curves.regret(worse, "search/asha") == pytest.approx(9.0 - best[1])
    assert curves.time_to_target(Found(QUICK, constants(), {}), "search/asha") is None


def test_every_figure_is_data(hoped):
    drawn = LAB.figure(hoped)
    assert len(drawn) == 12
    notes = " ".join(each.note for each in drawn)
    given_up = hoped.values["search/extrapolating", "given_up"]
    assert f"{given_up[-1]} of 27 trials were given up" in notes
    assert "in the population 16 times a member took over" in notes  # two of eight at each of eight meetings
    faster = next(each for each in drawn if each.title == "How much faster")
    assert [name for name, bars in faster.series.items() if not math.isnan(bars[-1])] == ["simulated"]
    for each in drawn:
        assert figures.from_json(figures.to_json(each)) == each
    assert LAB.figure(Found(QUICK, constants(), {})) == []


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"eta": 1}, "eta=1 is below the minimum of 2"),
        ({"workers": 0}, "workers=0 is below the minimum of 1 workers"),
        ({"most_steps": 12}, "most_steps=12 is below least_steps=24"),
        ({"width": 48}, "width=48 is no multiple of 32"),
        ({"population": 1}, "population=1 is below the minimum of 2"),
        ({"late_probability": 1.5}, "above the maximum of 1.0"),
        ({"configurations": 100_000}, "configurations=100000 is above the maximum of 1000"),
        ({"configurations": 1000, "least_steps": 1}, "222000 losses, and searches are planned with 20000"),
        ({"most_steps": 10**9}, "above the maximum of 100000 steps"),
    ],
)
def test_wrong_settings_are_named(sizes, said):
    with pytest.raises(ValueError, match=said):
        configure(LAB, "quick", sizes)


def test_sizes_that_no_machine_holds_need_memory_that_no_machine_has():
    huge = configure(LAB, "quick", {"width": 32_768, "layers": 100})
    assert LAB.memory_bytes(huge) > 1e13
    parameters = 12 * 32_768**2 * 100
    for more in ({"workers": huge.workers + 1}, {"together": huge.together + 1}):
        assert LAB.memory_bytes(replace(huge, **more)) - LAB.memory_bytes(huge) > 16 * parameters
    assert LAB.memory_bytes(QUICK) < 4e9


@pytest.mark.parametrize("sizes", [{"configurations": 1000, "least_steps": 16}, {"configurations": 2}])
def test_the_largest_and_the_smallest_search_are_predicted_within_seconds(sizes):
    config = configure(LAB, "quick", sizes)
    begin = time.process_time()
    assert all(each.value > 0 for each in LAB.predict(config, constants()))
    assert time.process_time() - begin < 30


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="no method 'bohb'; there is random"):
        QUICK.scheduler("bohb")


def test_the_lab_is_listed_without_what_is_heavy():
    code = "import sys, labs; labs.load('tuning'); print({'torch', 'jax', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done
