"""The serving simulator: the engine itself on a virtual clock, costs that add up, loads that are fixed by a
seed."""

import math
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs.serving import calibrating, extrapolation
from labs.serving.config import Config
from labs.serving.costs import Costs, Wires, fit, residual, terms
from labs.serving.counted import Seen
from labs.serving.engine import Shape
from labs.serving.layout import POLICIES, Layout
from labs.serving.measures import Limits, Served, little, measure, quantile
from labs.serving.request import Request
from labs.serving.simulator import Nothing, simulate
from labs.serving.trace import Arrival, Load, arrivals
from labs.serving.worker import Report

COSTS = Costs(2e-3, 1e-3, 1e-4, 1e-7, 5e-8, 1e-3, 4e-4, 1e-6, 5e-4)
WIRES = Wires(1e-3, 2e-3, 5e-4, 1e-9, 3e-3, 2e-9, 2e-4, 1e-10)
KV = 1000


def times(trace, layout, costs=COSTS, wires=WIRES):
    return {each.number: each for each in simulate(trace, layout, costs, wires, KV).served}


def test_a_lone_request_takes_what_the_formulas_say():
    trace = [Arrival(5.0, Request(0, tuple(range(100)), 3))]
    reading = COSTS.seconds(Shape(prompts=1, new=100, pairs=5050))
    writing = [COSTS.seconds(Shape(decodes=1, context=context)) for context in (101, 102)]
    first = 5.0 + WIRES.submit + reading + WIRES.deliver
    assert times(trace, Layout("prefill_first", budget=512))[0].at == pytest.approx(
        [first, first + writing[0], first + sum(writing)]
    )


def test_a_hand_over_takes_pack_travel_and_store_in_the_first_gap():
    trace = [Arrival(0.0, Request(0, tuple(range(100)), 3))]
    layout = Layout("disaggregated", budget=512, block_size=16)
    size = 7 * 16 * KV  # whole blocks are sent
    found = times(trace, layout)[0]
    reading = COSTS.seconds(Shape(prompts=1, new=100, pairs=5050))
    pack, travel = WIRES.pack + size * WIRES.pack_byte, WIRES.travel + size * WIRES.travel_byte
    writing = [COSTS.seconds(Shape(decodes=1, context=context)) for context in (101, 102)]
    first = WIRES.submit + reading + pack + WIRES.deliver
    store = WIRES.store + size * WIRES.store_byte  # of the 100 tokens' 7 blocks, whose last is not full
    second = first + travel + store + writing[0] + WIRES.deliver
    assert found.at == pytest.approx([first, second, second + writing[1]])


def test_pieces_of_a_prompt_cost_what_the_whole_does():
    """But for what a step costs by itself: an earlier simulation charged pieces twice and so made a
    winner."""
    free = replace(
        COSTS, step=0.0, reading=0.0, prompts=0.0, earlier=0.0, decodes=0.0, writing=0.0, context=0.0
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


# --- costs -------------------------------------------------------------------------------------------


def shapes(count=60, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        pieces, decodes = rng.randint(0, 2), rng.randint(0, 9)
        new = pieces * rng.randint(8, 200)
        earlier = pieces * rng.randint(0, 100)
        found.append(
            Shape(pieces, new, new * (earlier + new) // 2, earlier, decodes, decodes * rng.randint(20, 400))
        )
    return [shape for shape in found if shape.new or shape.decodes]


def test_costs_are_found_again_though_some_steps_were_disturbed():
    steps = [(shape, COSTS.seconds(shape)) for shape in shapes()]
    steps[3] = steps[3][0], 20 * steps[3][1]
    steps[17] = steps[17][0], 9 * steps[17][1]
    found = fit(steps)
    for field in fields(Costs):
        assert getattr(found, field.name) == pytest.approx(getattr(COSTS, field.name), rel=0.02), field.name
    assert residual(found, steps) < 0.01


def test_no_cost_is_negative():
    rng = random.Random(3)
    steps = [(shape, 1e-3 * rng.uniform(0.5, 1.5)) for shape in shapes()]
    found = fit(steps)
    assert all(getattr(found, field.name) >= 0 for field in fields(Costs))
    assert any(getattr(found, field.name) > 0 for field in fields(Costs))
    with pytest.raises(ValueError, match="5 steps do not tell 9 costs apart"):
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
    seen = Seen(submits=[0.25], travels=[(8, 0.125)], delivers=[0.125, 0.125])
    seen.reports = [(0, report(0.0, 1.0, 1.5, [1.0])), (1, report(1.875, 2.875, 2.875, [1.0]))]
    served = [Served(0, 0.0, -0.125, [1, 1], [1.5, 3.0])]
    assert seen.in_house == pytest.approx(0.25 + 1.0 + 0.5 + 0.125 + 0.125 + 1.0 + 0.125)
    assert little(served, seen.in_house, 3.0) == pytest.approx(0.0)
    seen.reports[1] = (1, report(1.875, 2.875, 2.875, []))
    assert little(served, seen.in_house, 3.0) > 0.3


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
    assert calibrating.best_chunk(config, replace(COSTS, step=1e-4, prompts=0.0), WIRES) == 32
    dear = replace(COSTS, step=0.02)
    assert calibrating.best_chunk(Config(itl_ms=1000.0, rate=3.0), dear, WIRES) >= 128
