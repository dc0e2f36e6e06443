"""Costs of steps and messages, measured on the workers that will be predicted.

Requests of many lengths are served alone and in batches, whole and in chunks, at once on every worker and on
one while the others rest, so that what workers take from each other is told from what a step costs. Then
some come at random, as those do that are predicted: how long messages travel and how much steps differ
depends on what else goes on. None of this is the load that is predicted: lengths and rates are others. A host
that is busy with other things gives other costs at each moment: it is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from labs.serving import legs
from labs.serving.config import Config
from labs.serving.costs import Costs, Fitted, Ran, Wires, factors, fit, rested
from labs.serving.engine import Shape
from labs.serving.fleet import Block, Fleet
from labs.serving.layout import POLICIES
from labs.serving.measures import quantile
from labs.serving.model import load_of, measures_of
from labs.serving.request import Request
from labs.serving.trace import Arrival, arrivals
from labs.serving.weights import VOCABULARY

BUSY_SHARE = 0.15  # of all cores, by other programs: more is refused
LOOK_S = 0.25
LENGTHS = (8, 16, 32, 64, 128, 192, 256, 384, 512)
BATCHES = (2, 4, 8, 16)
CHUNKS = (32, 64, 128)
"""In turn, so that pieces of many sizes attend to many earlier keys."""
SIZES = (32, 64, 128, 256)
"""Of chunks, that one is chosen from for a load."""
OUTPUT = 12
"""Tokens written behind each prompt: the first step after a prompt is dearer than those that follow."""
SHARES = {0.1: 6, 0.4: 16}
"""Of the time that workers are busy with requests that come at random: how many. Who has rested is slower."""
SAMPLE = 400
"""Factors of a kind that are kept, so that one in 400 is told."""


def busy() -> float:
    """Share of all cores that is in use while we do nothing."""
    import psutil

    return psutil.cpu_percent(LOOK_S) / 100


def calibrate(
    fleet: Fleet, config: Config, repeats: int = 1, first: int = 0
) -> tuple[Fitted | str, list[Block]]:
    """What was found, or why it is refused: the host is busy. And the blocks it was found from."""
    share = busy()
    if share > BUSY_SHARE:
        return f"other programs use {share:.0%} of the cores; at most {BUSY_SHARE:.0%} may", []
    blocks = run_blocks(fleet, config, repeats, first)
    share = busy()
    if share > BUSY_SHARE:
        return f"other programs came to use {share:.0%} of the cores meanwhile", blocks
    return fitted(blocks), blocks


def calibrated(fleet: Fleet, config: Config) -> Fitted | None:
    """What is known of these workers; calibrated now where others were, in a run that is resumed. None where
    that is refused."""
    if not fleet.fitted:
        fleet.fitted, _ = calibrate(fleet, config)
    return fleet.fitted if isinstance(fleet.fitted, Fitted) else None


def run_blocks(fleet: Fleet, config: Config, repeats: int = 1, first: int = 0) -> list[Block]:
    """Every size under the colocated policies, hand-overs one by one, and all policies at random. first: the
    number of the first repeat; each has other requests."""
    found = []
    for repeat in range(first, first + repeats):
        for policy, only in (("prefill_first", None), ("prefill_first", 0), ("chunked", None)):
            for index, trace in enumerate(_scripts(config, repeat, 1 if only == 0 else config.workers)):
                chunk = CHUNKS[(index + repeat) % len(CHUNKS)]
                found.append(fleet.serve(config.layout(policy, chunk), trace, only))
        found.append(fleet.serve(config.layout("disaggregated"), _spaced(config, repeat)))
    costs = fitted(found).costs
    for repeat in range(first, first + repeats):
        for share, count in SHARES.items():
            trace = _at_random(config, f"{share} {repeat}", costs, share, count)
            for policy in POLICIES:
                found.append(fleet.serve(config.layout(policy, CHUNKS[repeat % len(CHUNKS)]), trace))
    return found


def fitted(blocks: Sequence[Block]) -> Fitted:
    """Costs, wires and how they differ from what was seen. ValueError: too few steps."""
    steps = steps_of(blocks)
    costs, disturbance = fit(steps)
    seen = legs.Legs()
    for block in blocks:
        seen.read(block.seen)
    wires = wires_of(seen)
    prompts, writing, anew = (
        [each for each in steps if (each.shape.prompts > 0, each.shape.writing_anew > 0) in kinds]
        for kinds in (((True, False), (True, True)), ((False, False),), ((False, True),))
    )
    disturbance = replace(
        disturbance,
        reading=sample(factors(costs, disturbance, prompts)),
        writing=sample(factors(costs, disturbance, writing)),
        writing_anew=sample(factors(costs, disturbance, anew)),
        submit=sample(
            [way / (wires.submit + wires.submit_rest * rested(rest)) for rest, way in seen.submits]
        ),
        deliver=sample(_over(seen.delivers, wires.deliver)),
        deliver_first=sample(_over(seen.first_delivers, wires.deliver)),
        post=sample(_over(seen.posts, wires.post)),
        travel=sample([way / (wires.travel + wires.travel_byte * size) for size, way in seen.travels]),
    )
    return Fitted(costs, wires, disturbance)


def steps_of(blocks: Sequence[Block]) -> list[Ran]:
    return [step for block in blocks for step in legs.steps_of(block.seen, block.workers)]


def _over(seconds: Sequence[float], middle: float) -> list[float]:
    return [each / middle for each in seconds] if middle > 0 else []


def sample(values: Sequence[float], most: int = SAMPLE) -> tuple[float, ...]:
    """All values in order, or so many of them at equal distances in that order."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[int((index + 0.5) * len(ordered) / most)] for index in range(most))


def wires_of(seen: legs.Legs) -> Wires:
    def middle(values: Sequence[float]) -> float:
        return quantile(values, 0.5) if values else 0.0

    submit = quantile([seconds for _, seconds in seen.submits], 0.1) if seen.submits else 0.0
    doublings = [(rested(rest), seconds - submit) for rest, seconds in seen.submits if rest > 0]
    return Wires(
        submit,
        middle(seen.delivers),
        *_line(seen.packs),
        *_line(seen.travels),
        *_line(seen.stores),
        middle(seen.posts),
        max(0.0, middle([longer / count for count, longer in doublings])),
    )


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds, seconds a byte) through the medians of the smaller and the larger half; none is negative."""
    if not points:
        return 0.0, 0.0
    ordered = sorted(points)
    halves = ordered[: (len(ordered) + 1) // 2], ordered[len(ordered) // 2 :]
    (x0, y0), (x1, y1) = (
        (quantile([size for size, _ in half], 0.5), quantile([seconds for _, seconds in half], 0.5))
        for half in halves
    )
    slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
    return max(0.0, y0 - slope * x0), slope


def _scripts(config: Config, repeat: int, workers: int) -> Iterator[list[Arrival]]:
    """Blocks that each begin when the one before is done; what is in one comes at once, the same on all
    workers."""
    drawn = random.Random(repeat)
    numbers = iter(range(10**9))
    longest = min(config.context, config.blocks * 16) - 16
    for length in LENGTHS:
        if length <= longest:
            yield [_request(numbers, drawn, length, OUTPUT) for _ in range(workers)]
    for batch in BATCHES:
        mixed = [min(longest, drawn.choice(LENGTHS[2:])) for _ in range(batch)]
        yield [_request(numbers, drawn, length, OUTPUT) for length in mixed for _ in range(workers)]


def _at_random(config: Config, name: str, costs: Costs, share: float, count: int) -> list[Arrival]:
    """Requests of all lengths whose gaps are exponential, so far apart that workers are busy for ``share`` of
    the time if each is served alone."""
    drawn, numbers = random.Random(name), iter(range(10**9))
    longest = min(config.context, config.blocks * 16) - 2 * OUTPUT
    lengths = [length for length in LENGTHS if length <= longest]
    mean = sum(lengths) // len(lengths)
    lone = costs.seconds(Shape(prompts=1, new=mean, pairs=mean * (mean + 1) // 2))
    lone += 2 * OUTPUT * costs.seconds(Shape(decodes=1, context=mean))
    now, found = 0.0, []
    for _ in range(count):
        now += drawn.expovariate(share * config.workers / lone)
        found.append(_request(numbers, drawn, drawn.choice(lengths), 2 * OUTPUT, now))
    return found


def _spaced(config: Config, repeat: int) -> list[Arrival]:
    """One after the other, so that hand-overs meet nothing else."""
    drawn, numbers = random.Random(f"spaced {repeat}"), iter(range(10**9))
    longest = min(config.context, config.blocks * 16) - 16
    return [
        _request(numbers, drawn, min(longest, length), 4, 0.12 * index)
        for index, length in enumerate((64, 256, 128, 384, 32, 512, 192, 320))
    ]


def _request(
    numbers: Iterator[int], drawn: random.Random, length: int, output: int, at: float = 0.0
) -> Arrival:
    prompt = tuple(drawn.choices(range(VOCABULARY), k=length))
    return Arrival(at, Request(next(numbers), prompt, output))


def best_chunk(config: Config, fitted: Fitted) -> int:
    """The chunk size under which most requests of the config's load meet their limits, the shortest gaps
    deciding between equals: in the simulator, on requests that are not measured."""
    trace = arrivals(replace(load_of(config), seed=config.seed + 1), 200)
    found = {}
    for chunk in SIZES:
        done = measures_of(config, trace, config.layout("chunked", chunk), fitted)
        found[chunk] = (-round(done.attained, 2), done.itl_p99 + done.ttft_p50)
    return min(found, key=lambda chunk: found[chunk])
