"""Virtual devices take the time they are set to, and the gradients of a product."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from parallel import schedules
from parallel.pipeline import Pipeline
from parallel.pipeline_split import Sources, Split
from parallel.virtual import VirtualStage, sleep_until, virtual_stages


def seconds_of(function):
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


@pytest.mark.alone
def test_each_half_takes_its_time():
    """Late by some tenths of a millisecond, on a busy machine by more; the best of five tells."""
    found = {"forward": [], "input": [], "weight": [], "both": []}
    stage = VirtualStage(0.01, 0.02, 0.03)
    for _ in range(5):
        x = torch.ones(2, 3, requires_grad=True)
        begun = time.perf_counter()
        y = stage(x)
        found["forward"].append(time.perf_counter() - begun)
        split = Split([get_gradient_edge(y)], [get_gradient_edge(x)])
        found["input"].append(seconds_of(lambda split=split, y=y: split.inputs([torch.ones_like(y)])))
        found["weight"].append(seconds_of(split.weights))
        y = stage(x)
        found["both"].append(seconds_of(y.sum().backward))
    for name, expected in {"forward": 0.01, "input": 0.02, "weight": 0.03, "both": 0.05}.items():
        assert expected <= min(found[name]) < expected + 0.003, name


def test_the_first_stage_has_an_input_half_too():
    stage = VirtualStage(0.0, 0.02, 0.0, is_first=True)
    sources = Sources(stage)
    y = stage(torch.ones(2))
    split = Split([get_gradient_edge(y)], sources.take())
    assert seconds_of(lambda: split.inputs([torch.ones(2)])) >= 0.02
    assert stage.weight.grad is None
    split.weights()
    assert stage.weight.grad == 2
    assert stage.begin.shift.grad == 2


def test_sleeps_not_less():
    for seconds in (0.0, 0.0005, 0.003, 0.02):
        when = time.perf_counter() + seconds
        sleep_until(when)
        assert time.perf_counter() >= when
    begun = time.perf_counter()
    sleep_until(begun - 1.0)
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_impossible_times(seconds):
    with pytest.raises(ValueError, match="input_gradient must be a number of seconds, 0 or more"):
        VirtualStage(0.0, seconds, 0.0)


UNIT = 0.01


def step_seconds(name, microbatches):
    schedule = schedules.build(name, dist.get_world_size(), microbatches)
    stages = virtual_stages(schedule.stages, UNIT, UNIT, UNIT)
    pipeline = Pipeline(list(stages), schedule, torch.nn.functional.mse_loss)
    x = torch.ones(microbatches, 4)
    found = []
    for _ in range(3):
        dist.barrier()
        found.append(seconds_of(lambda: pipeline.step(x, x)))
    return min(found)


@pytest.mark.alone
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_a_step_takes_what_the_simulator_says(ranks, name):
    """Not less on any rank but by the ranks' different starts; the suite says how little more."""
    simulated = schedules.simulate(schedules.build(name, 3, 4), schedules.Durations(UNIT, UNIT, UNIT)).step
    slowest = max(ranks.run(3, step_seconds, name, 4))
    assert simulated * 0.99 <= slowest < simulated * 1.3
