"""The serving simulator: the engine itself on a virtual clock, costs that add up, loads that are fixed by a
seed."""

import math
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs.serving import calibrating, extrapolation, legs
from labs.serving.config import Config
from labs.serving.costs import Costs, Disturbance, Fitted, Ran, Wires, crowded, fit, residual, terms
from labs.serving.counted import Seen, Trip
from labs.serving.engine import Shape
from labs.serving.layout import POLICIES, Layout
from labs.serving.measures import Limits, Served, little, measure, quantile
from labs.serving.request import Request
from labs.serving.simulator import Nothing, simulate
from labs.serving.trace import Arrival, Load, arrivals
from labs.serving.worker import Report

COSTS = Costs(2e-3, 1e-3, 1e-4, 1e-7, 5e-8, 1e-3, 4e-4, 1e-6, 5e-4, 8e-4, 6e-4)
WIRES = Wires(1e-3, 2e-3, 5e-4, 1e-9, 3e-3, 2e-9, 2e-4, 1e-10, 3e-4)
KV = 1000
NO_WIRES = Wires()


def times(trace, layout, costs=COSTS, wires=WIRES):
    return {each.number: each for each in simulate(trace, layout, costs, wires, KV).served}


def test_a_lone_request_takes_what_the_formulas_say():
    trace = [Arrival(5.0, Request(0, tuple(range(100)), 3))]
    reading = COSTS.seconds(Shape(prompts=1, new=100, pairs=5050, reading_anew=1))
    writing = [
        WIRES.post + COSTS.seconds(Shape(decodes=1, context=context, writing_anew=turns))
        for context, turns in ((101, 1), (102, 0))
    ]
    first = 5.0 + WIRES.submit + reading + WIRES.deliver
    assert times(trace, Layout("prefill_first", budget=512))[0].at == pytest.approx(
        [first, first + writing[0], first + sum(writing)]
    )


def test_a_hand_over_takes_pack_travel_and_store_in_the_first_gap():
    trace = [Arrival(0.0, Request(0, tuple(range(100)), 3))]
    layout = Layout("disaggregated", budget=512, block_size=16)
    size = 7 * 16 * KV  # whole blocks are sent
    found = times(trace, layout)[0]
    reading = COSTS.seconds(Shape(prompts=1, new=100, pairs=5050, reading_anew=1))
    pack, travel = WIRES.pack + size * WIRES.pack_byte, WIRES.travel + size * WIRES.travel_byte
    writing = [
        COSTS.seconds(Shape(decodes=1, context=context, writing_anew=turns))
        for context, turns in ((101, 1), (102, 0))
    ]
    first = WIRES.submit + reading + pack + WIRES.deliver
    store = WIRES.store + size * WIRES.store_byte  # of the 100 tokens' 7 blocks, whose last is not full
    second = first + travel + store + writing[0] + WIRES.deliver
    assert found.at == pytest.approx([first, second, second + WIRES.post + writing[1]])


def test_pieces_of_a_prompt_cost_what_the_whole_does():
    """But for what a step costs by itself: an earlier simulation charged pieces twice and so made a
    winner."""
    free = replace(
        COSTS,
        step=0.0,
        reading=0.0,
        prompts=0.0,
        earlier=0.0,
        decodes=0.0,
        writing=0.0,
        context=0.0,
        reading_anew=0.0,
        writing_anew=0.0,
        reading_rest=0.0,
    )
    trace = [Arrival(0.0, Request(0, (1,) * 512, 1))]
    first = [
        times(trace, layout, free, Wires())[0].at[0]
        for layout in (Layout("prefill_first", budget=512), Layout("chunked", budget=64))
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-12)


@given(
    st.sampled_from(POLICIES),
    st.integers(1, 40),
    st.floats(0.5, 500),
    st.integers(2, 5),
    st.floats(0.0, 0.45),
    st.integers(6, 40),
)
@settings(max_examples=40)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(
    policy, count, rate, workers, common, blocks
):
    layout = Layout(policy, workers, 1, budget=24, blocks=blocks, block_size=8)
    trace = arrivals(Load(rate, 20, 8, common), count)
    found = simulate(trace, layout, COSTS, WIRES, KV)
    assert found.leaked == 0
    asked = {each.request.number: each.request.output for each in trace}
    for each in found.served:
        assert len(each.at) == asked[each.number]
        assert each.at == sorted(each.at)
        assert each.ttft > WIRES.submit + WIRES.deliver
    assert (found.sent > 0) == (policy == "disaggregated" and any(output > 1 for output in asked.values()))


def test_the_simulator_takes_the_steps_that_the_model_does():
    """One code: shapes of all steps are those of an engine that computes."""
    from serving_model import SMALL, model, requests

    from labs.serving.paged import PagedGPT

    for policy in ("prefill_first", "chunked"):
        layout = Layout(policy, budget=21, **SMALL)
        shapes = []
        for executor in (PagedGPT(model().float(), layout.blocks, layout.block_size), Nothing(4, 1)):
            engine = layout.engine("both", executor)
            for each in requests(5, common=8):
                engine.add(each, 0.0)
            row = []
            while (step := engine.step()) is not None:
                row.append((step.shape, step.held))
            shapes.append(row)
        assert shapes[0] == shapes[1]


def test_shared_prompts_are_found_and_read_once():
    layout = Layout("chunked", workers=1, budget=64, block_size=8)
    with_common, without = (
        simulate(arrivals(Load(5, 64, 4, common), 60), layout, COSTS, WIRES, KV) for common in (0.4, 0.0)
    )
    assert without.hits == 0
    assert 0.2 < with_common.hits < 0.5
    assert measure(with_common.served, Limits(1, 1)).ttft_p50 < measure(without.served, Limits(1, 1)).ttft_p50


# --- what workers take from each other, and how much steps and messages differ -----------------------


def alone(prompt, number=0, at=0.0):
    """A request that reads and writes one token, in a step."""
    return Arrival(at, Request(number, (number,) * prompt, 1))


def reading(prompt):
    return COSTS.seconds(Shape(prompts=1, new=prompt, pairs=prompt * (prompt + 1) // 2, reading_anew=1))


def disturbed(trace, disturbance, wires=NO_WIRES, workers=2, seed=0, policy="prefill_first"):
    layout = Layout(policy, workers, budget=512)
    return {
        each.number: each.at for each in simulate(trace, layout, COSTS, wires, KV, disturbance, seed).served
    }


def test_workers_slow_each_other_only_while_both_are_at_work():
    beside = Disturbance(reading_beside_reading=0.5)
    assert disturbed([alone(100)], beside)[0] == pytest.approx([reading(100)])
    found = disturbed([alone(100), alone(300, 1)], beside)
    both = 1.5 * reading(100)  # until the shorter one is done
    assert found[0] == pytest.approx([both])
    assert found[1] == pytest.approx([both + reading(300) - reading(100)])
    late = 0.5 * reading(300)
    found = disturbed([alone(300), alone(100, 1, late)], beside)
    assert found[1] == pytest.approx([late + both])
    assert found[0] == pytest.approx([late + both + reading(300) - late - reading(100)])
    three = disturbed([alone(100), alone(300, 1)], beside, workers=3)  # one of two others
    assert three[0] == pytest.approx([1.25 * reading(100)])
    writes = [Arrival(0.0, Request(0, (1,) * 100, 40))]
    exact = disturbed(writes, beside)[0]
    trace = [*writes, alone(100, 1, exact[5])]
    slower = disturbed(trace, Disturbance(reading_beside_writing=0.5))
    assert slower[1] == pytest.approx([exact[5] + 1.5 * reading(100)])
    assert slower[0] == pytest.approx(exact)
    slower = disturbed(trace, Disturbance(writing_beside_reading=0.5))
    assert slower[1] == pytest.approx([exact[5] + reading(100)])
    assert slower[0][-1] == pytest.approx(exact[-1] + reading(100) / 3)


def test_every_step_and_way_is_drawn_from_what_was_seen():
    """With its own factor, and from the seed alone."""
    trace = [Arrival(0.0, Request(0, (1,) * 100, 3))]
    exact = times(trace, Layout("prefill_first", budget=512))[0].at
    first = disturbed(trace, Disturbance(reading=(2.0,)), WIRES)[0]
    assert first == pytest.approx([at + reading(100) for at in exact])
    assert disturbed(trace, Disturbance(submit=(3.0,)), WIRES)[0][0] - exact[0] == pytest.approx(
        2 * WIRES.submit
    )
    late = disturbed(trace, Disturbance(deliver=(3.0,), deliver_first=(2.0,)), WIRES)[0]
    assert [mine - other for mine, other in zip(late, exact, strict=True)] == pytest.approx(
        [WIRES.deliver, 2 * WIRES.deliver, 2 * WIRES.deliver]
    )
    anew = disturbed(trace, Disturbance(writing_anew=(2.0,)), WIRES)[0]
    assert anew[0] == pytest.approx(exact[0])
    assert [anew[n] - exact[n] for n in (1, 2)] == pytest.approx(2 * [exact[1] - exact[0] - WIRES.post])
    slower = disturbed(trace, Disturbance(writing=(2.0,)), WIRES)[0]
    assert slower[:2] == pytest.approx(exact[:2])
    assert slower[2] - exact[2] == pytest.approx(exact[2] - exact[1] - WIRES.post)
    later = disturbed(trace, Disturbance(post=(2.0,)), WIRES)[0]
    assert [a - b for a, b in zip(later, exact, strict=True)] == pytest.approx(
        [0, WIRES.post, 2 * WIRES.post]
    )
    loads = arrivals(Load(20, 100, 8), 20)
    noise = Disturbance(reading=(0.5, 1.0, 2.0), writing=(0.5, 1.5), submit=(1.0, 9.0))
    assert disturbed(loads, noise, WIRES) == disturbed(loads, noise, WIRES)
    assert disturbed(loads, noise, WIRES) != disturbed(loads, noise, WIRES, seed=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_report_overtakes_another(policy):
    """They come over one connection. What is handed over takes its own way."""
    noise = Disturbance(deliver=(0.1, 1.0, 200.0), travel=(0.1, 10.0), submit=(0.1, 10.0))
    trace = arrivals(Load(20, 100, 12), 40)
    found = disturbed(trace, noise, WIRES, policy=policy)
    for each in trace:
        assert len(found[each.request.number]) == each.request.output
        assert found[each.request.number] == sorted(found[each.request.number])


def test_a_worker_that_has_rested_is_slower_and_hears_later():
    rests = replace(COSTS, reading_rest=2e-3, writing_rest=1e-3)
    trace = [alone(100), alone(100, 1, 1.0), alone(100, 2, 1.0)]
    found = simulate(trace, Layout("prefill_first", 1, budget=128), rests, NO_WIRES, KV).served
    first = found[0].at[0]
    assert first == pytest.approx(reading(100))  # the clock begins where its rest does
    again = 1.0 + reading(100) + 2e-3 * math.log2(1 + (1.0 - first) / 0.01)
    assert found[1].at[0] == pytest.approx(again)
    assert found[2].at[0] == pytest.approx(again + reading(100))  # no rest between these
    wires = Wires(submit=1e-3, submit_rest=1e-4)
    late = simulate(trace, Layout("prefill_first", 1, budget=128), COSTS, wires, KV).served
    waits = late[1].at[0] - 1.0 - reading(100)
    assert waits == pytest.approx(1e-3 + 1e-4 * math.log2(1 + (1.0 - late[0].at[0]) / 0.01))


# --- costs -------------------------------------------------------------------------------------------


def shapes(count=60, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        pieces, decodes = rng.randint(0, 2), rng.randint(0, 9)
        new = pieces * rng.randint(8, 200)
        earlier = pieces * rng.randint(0, 100)
        context, anew = decodes * rng.randint(20, 400), [min(n, rng.randint(0, 1)) for n in (pieces, decodes)]
        found.append(Shape(pieces, new, new * (earlier + new) // 2, earlier, decodes, context, *anew))
    return [shape for shape in found if shape.new or shape.decodes]


def test_costs_are_found_again_though_some_steps_were_disturbed():
    steps = [Ran(shape, COSTS.seconds(shape)) for shape in shapes()]
    steps[3] = replace(steps[3], seconds=20 * steps[3].seconds)
    steps[17] = replace(steps[17], seconds=9 * steps[17].seconds)
    found, beside = fit(steps)
    for field in fields(Costs):
        assert getattr(found, field.name) == pytest.approx(getattr(COSTS, field.name), rel=0.02), field.name
    assert residual(found, beside, steps) < 0.01


def test_what_is_fitted_is_a_mean():
    """Steps queue: what waits, waits for the mean of those before it. Least squares of the error as a share
    of what was measured lie far below it."""
    factors = [0.6, 0.8, 1.0, 1.6]
    steps = [Ran(shape, factors[i % 4] * COSTS.seconds(shape)) for i, shape in enumerate(shapes(4000))]
    found, _ = fit(steps)
    ratios = [found.seconds(shape) / COSTS.seconds(shape) for shape in shapes(200, 1)]
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, rel=0.03)


def test_what_neighbours_take_is_told_from_what_a_step_costs():
    rng = random.Random(5)
    steps = []
    for shape in shapes(400):
        reads, writes, rest = rng.choice((0.0, 0.4)), rng.choice((0.0, 0.6)), rng.choice((0.0, 0.02, 0.3))
        share = 0.1 * reads + 0.3 * writes if shape.prompts else 0.2 * reads + 0.05 * writes
        steps.append(Ran(shape, COSTS.seconds(shape, rest) * (1 + share), reads, writes, rest))
    found, beside = fit(steps)
    assert beside.reading_beside_reading == pytest.approx(0.1, rel=0.05)
    assert beside.reading_beside_writing == pytest.approx(0.3, rel=0.05)
    assert beside.writing_beside_reading == pytest.approx(0.2, rel=0.05)
    assert beside.writing_beside_writing == pytest.approx(0.05, rel=0.05)
    for field in fields(Costs):
        assert getattr(found, field.name) == pytest.approx(getattr(COSTS, field.name), rel=0.03, abs=1e-9), (
            field.name
        )
    for shape, share in (
        (Shape(prompts=1, new=100, pairs=5050, earlier=10, reading_anew=1), 0.2),
        (Shape(decodes=3, context=300, writing_anew=1), 0.125),
    ):
        slower = crowded(replace(COSTS, step=0.0), beside).seconds(shape)
        assert slower == pytest.approx((1 + share) * replace(COSTS, step=0.0).seconds(shape), rel=0.02)


def test_no_cost_is_negative():
    rng = random.Random(3)
    steps = [Ran(shape, 1e-3 * rng.uniform(0.5, 1.5)) for shape in shapes()]
    found, _ = fit(steps)
    assert all(getattr(found, field.name) >= 0 for field in fields(Costs))
    assert any(getattr(found, field.name) > 0 for field in fields(Costs))
    with pytest.raises(ValueError, match="5 steps do not tell 13 costs apart"):
        fit(steps[:5])


def test_terms_are_the_formula():
    for shape in shapes(10):
        values = [getattr(COSTS, field.name) for field in fields(Costs)]
        assert sum(a * b for a, b in zip(values, terms(shape), strict=True)) == pytest.approx(
            COSTS.seconds(shape)
        )


# --- load --------------------------------------------------------------------------------------------


def test_a_load_is_fixed_by_its_seed_and_has_its_rate():
    load = Load(20.0, 40, 10)
    trace = arrivals(load, 2000)
    assert trace == arrivals(load, 2000)
    assert trace != arrivals(replace(load, seed=1), 2000)
    assert trace[0].request.prompt != arrivals(load, 5, 2000)[0].request.prompt
    rate = len(trace) / trace[-1].at
    assert abs(rate - 20) < 4 * 20 / math.sqrt(2000)
    lengths = [len(each.request.prompt) for each in trace]
    assert (min(lengths), max(lengths)) == (20, 60)
    faster = arrivals(replace(load, rate=40.0), 2000)
    assert [each.request for each in faster] == [each.request for each in trace]
    assert [each.at * 2 for each in faster] == pytest.approx([each.at for each in trace])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(rate=-1.0), "rate=-1.0 requests/s must lie above 0"),
        (dict(rate=0.0), "must lie above 0"),
        (dict(rate=math.inf), "must lie above 0"),
        (dict(rate=math.nan), "must lie above 0"),
        (dict(rate=1e9), "at most 1000000"),
        (dict(prompt=0), "must be at least 1"),
        (dict(common=0.5), "below 0.5"),
    ],
)
def test_a_load_that_cannot_be_is_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        Load(**{**dict(rate=1.0, prompt=10, output=10), **settings_})


@pytest.mark.parametrize("name", ["ttft", "itl"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_cannot_be_met_is_refused(name, value):
    with pytest.raises(ValueError, match=f"a limit of {name}"):
        Limits(**{**dict(ttft=1.0, itl=1.0), name: value})


# --- measures ----------------------------------------------------------------------------------------


def test_measures_by_hand():
    served = [
        Served(0, 0.0, 0.0, [1, 1, 1], [1.0, 1.5, 2.5]),
        Served(1, 1.0, 1.1, [1, 1], [1.5, 1.75]),
        Served(2, 2.0, 2.0, [1], [4.0]),
    ]
    found = measure(served, Limits(1.0, 0.5))
    assert (found.ttft_p50, found.ttft_p99) == (1.0, 2.0)
    assert (found.itl_p50, found.itl_max) == (0.5, 1.0)
    assert found.attained == pytest.approx(1 / 3)  # a gap of 1 s; in time; a first token after 2 s
    assert found.met == pytest.approx(1 / 4)
    assert found.throughput == pytest.approx(6 / 4)
    assert quantile([3, 1, 2, 4], 0.5) == 2
    with pytest.raises(ValueError, match="nothing was served"):
        measure([], Limits(1, 1))


def test_little_sees_a_request_that_the_counter_forgot():
    served = [Served(n, float(n), float(n), [1], [n + 2.0]) for n in range(10)]
    assert little(served, counted=20.0, span=11.0) == 0
    assert little(served, counted=18.0, span=11.0) == pytest.approx(0.1)


def report(began, ended, free, stayed):
    return Report(0, (), Shape(), began, ended, free, 0, (), stayed, (), 0, 0)


def test_what_workers_report_is_what_who_asks_sees_but_for_what_is_lost():
    """A request: 0.25 s on its way, 1 on the first worker, 0.5 taken out and packed, 0.125 until that is
    heard, 0.125 travelling, 1 on the second worker, 0.125 until that is heard."""
    trips = [Trip(0, 0.0, 0.25, 0), Trip(8, 1.625, 1.75, 1)]
    seen = Seen(trips=trips, delivers=[0.125, 0.125])
    seen.reports = [(0, report(0.0, 1.0, 1.5, [1.0])), (1, report(1.875, 2.875, 2.875, [1.0]))]
    served = [Served(0, 0.0, -0.125, [1, 1], [1.5, 3.0])]
    assert seen.in_house == pytest.approx(0.25 + 1.0 + 0.5 + 0.125 + 0.125 + 1.0 + 0.125)
    assert little(served, seen.in_house, 3.0) == pytest.approx(0.0)
    seen.reports[1] = (1, report(1.875, 2.875, 2.875, []))
    assert little(served, seen.in_house, 3.0) > 0.3


def step_seen(began, ended, free, held, stored=(), number=None):
    arrived = [(number, 0.0)] if number is not None else []
    return Report(0, (), Shape(decodes=1), began, ended, free, held, stored, (), arrived, 0, 0)


def test_where_time_goes_is_read_from_what_was_seen():
    """Worker 0: a request sent at 1 wakes it at 1.25, two steps with 0.125 between them. Worker 1: what is
    handed over is sent at 2 and taken up at 3, stored in 0.5 and computed until 5; another one comes while it
    works."""
    seen = Seen()
    seen.reports = [
        (0, step_seen(0.5, 0.5, 0.5, 0)),
        (0, step_seen(1.25, 2.25, 2.25, 1, number=0)),
        (0, step_seen(2.375, 4.375, 4.5, 0)),
        (1, step_seen(3.5, 5.0, 5.0, 2, [(64, 0.5)], number=1)),
        (1, step_seen(5.5, 6.0, 6.0, 0, number=2)),
        (1, step_seen(7.0, 7.0, 7.0, 0)),
    ]
    seen.trips = [Trip(0, 1.0, 1.125, 1), Trip(64, 2.0, 2.5, 3), Trip(0, 4.0, 4.5, 4)]
    seen.delivers, seen.packs = [9.0, 0.1, 0.2, 0.3, 0.4, 0.5], [(64, 0.125)]
    found = legs.Legs()
    found.read(seen)
    assert found.submits == [(0.5, 0.25)]  # not that which met a worker at work
    assert found.travels == [(64, 1.0)]
    assert found.posts == [0.125, 0.5]
    assert found.stores == [(64, 0.5)]
    assert found.packs == [(64, 0.125)]
    assert found.delivers == [0.1, 0.2, 0.3, 0.4]
    assert found.first_delivers == []
    steps = list(legs.steps_of(seen, workers=2))
    assert [step.seconds for step in steps] == [1.0, 2.0, 1.5, 0.5]
    assert [step.rest for step in steps] == [0.75, 0.125, 0.0, 0.5]
    assert [step.beside_writing for step in steps] == pytest.approx([0.0, 0.875 / 2, 0.875 / 1.5, 0.0])
    assert all(step.beside_reading == 0.0 for step in steps)
    assert next(iter(legs.steps_of(seen, workers=3))).beside_writing == 0.0
    assert list(legs.steps_of(seen, workers=3))[1].beside_writing == pytest.approx(0.875 / 4)


def test_a_sample_keeps_the_distribution():
    values = [float(n) for n in range(1000)]
    found = calibrating.sample(reversed(values), 100)
    assert len(found) == 100
    assert sum(found) / 100 == pytest.approx(sum(values) / 1000, rel=0.01)
    assert (found[0], found[-1]) == (5.0, 995.0)
    assert calibrating.sample([3.0, 1.0], 100) == (1.0, 3.0)


# --- beyond what is at hand --------------------------------------------------------------------------


def test_goodput_falls_with_costs_and_rises_with_workers():
    case = extrapolation.Case(64, 8, requests=20)
    config = Config()
    layout = extrapolation.layouts(case, config)[extrapolation.COLOCATED][0]
    rate = extrapolation.goodput(case, layout, config, COSTS, WIRES)
    more = replace(case, workers=4)
    wide = extrapolation.layouts(more, config)[extrapolation.COLOCATED][0]
    assert extrapolation.goodput(more, wide, config, COSTS, WIRES) > 1.5 * rate > 0
    slow = replace(WIRES, deliver=100.0)
    assert extrapolation.goodput(case, layout, config, COSTS, slow) == 0.0


def test_goodput_is_not_held_down_by_where_the_search_begins():
    """Who writes in large batches of cheap decodes serves far more than the lone requests' times say."""
    config, case = Config(), extrapolation.Case(32, 64, requests=20)
    cheap = replace(COSTS, step=5e-3, decodes=1e-5, context=0.0, new=1e-6, prompts=0.0, pairs=0.0)
    layout = extrapolation.layouts(case, config)[extrapolation.COLOCATED][0]
    reading, writing = extrapolation.lone(case, cheap)
    rate = extrapolation.goodput(case, layout, config, cheap, WIRES)
    assert rate > 2 * case.workers / (reading + case.output * writing / 4)
    limits = extrapolation.limits_of(case, cheap)

    def attained(rate):
        trace = arrivals(Load(rate, case.prompt, case.output), int(5 * limits.ttft * rate))
        return measure(simulate(trace, layout, cheap, WIRES, 8192).served, limits).attained

    assert attained(rate) >= extrapolation.ATTAINED > attained(1.1 * rate)


def test_a_slow_link_and_long_outputs_are_where_to_avoid_it():
    config = Config()
    ratios = {}
    for name, case, wires in (
        ("long outputs", extrapolation.Case(32, 96, requests=20), WIRES),
        ("long prompts", extrapolation.Case(384, 8, requests=20), WIRES),
        ("slow link", extrapolation.Case(384, 8, requests=20), replace(WIRES, travel_byte=1e-5)),
    ):
        found = extrapolation.best(case, config, COSTS, wires)
        ratios[name] = found[extrapolation.DISAGGREGATED] / found[extrapolation.COLOCATED]
    assert ratios["long outputs"] < 0.8
    assert ratios["long prompts"] > ratios["long outputs"]
    assert ratios["slow link"] < ratios["long prompts"]


def test_the_rivals_have_the_same_workers_and_memory():
    for case in (extrapolation.Case(64, 8), extrapolation.Case(64, 8, workers=8)):
        found = extrapolation.layouts(case, Config())
        every = [layout for row in found.values() for layout in row]
        assert {(each.workers, each.blocks, each.block_size, each.most) for each in every} == {
            (case.workers, 512, 16, 64)
        }
        assert {each.policy for each in found[extrapolation.COLOCATED]} == {"prefill_first", "chunked"}
        assert {each.policy for each in found[extrapolation.DISAGGREGATED]} == {"disaggregated"}


def test_the_chunk_is_tuned_to_the_limits():
    """Long gaps forbidden: a small one. Steps that cost much by themselves: a large one."""
    config = Config(itl_ms=8.0)
    assert calibrating.best_chunk(config, Fitted(replace(COSTS, step=1e-4, prompts=0.0), WIRES)) == 32
    dear = replace(COSTS, step=0.02)
    assert calibrating.best_chunk(Config(itl_ms=1000.0, rate=3.0), Fitted(dear, WIRES)) >= 128
