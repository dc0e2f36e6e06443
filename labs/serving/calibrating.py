"""Costs of steps and messages, measured on the workers that will be predicted, all of them at work at once.

Requests of many lengths are served alone and in batches, whole and in chunks, at once on every worker, so
that what workers take from each other is part of the costs. None of this is the load that is predicted. A
host that is busy with other things gives other costs at each moment: it is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from labs.serving.config import Config
from labs.serving.costs import Costs, Wires, fit
from labs.serving.engine import Shape
from labs.serving.fleet import Block, Fitted, Fleet
from labs.serving.measures import quantile
from labs.serving.request import Request
from labs.serving.trace import Arrival
from labs.serving.weights import VOCABULARY

BUSY_SHARE = 0.15  # of all cores, by other programs: more is refused
LOOK_S = 0.25
LENGTHS = (8, 16, 32, 64, 128, 192, 256, 384, 512)
BATCHES = (2, 4, 8, 16)
CHUNKS = (32, 64, 128)
"""In turn, so that pieces of many sizes attend to many earlier keys."""
OUTPUT = 12
"""Tokens written behind each prompt: the first step after a prompt is dearer than those that follow."""


def busy() -> float:
    """Share of all cores that is in use while we do nothing."""
    import psutil

    return psutil.cpu_percent(LOOK_S) / 100


def calibrate(fleet: Fleet, config: Config, repeats: int = 1) -> tuple[Fitted, list[Block]]:
    """What was found, and the blocks it was found from; refused where the host is busy."""
    share = busy()
    if share > BUSY_SHARE:
        return Fitted(
            refused=f"other programs use {share:.0%} of the cores; at most {BUSY_SHARE:.0%} may"
        ), []
    blocks = run_blocks(fleet, config, repeats)
    share = busy()
    if share > BUSY_SHARE:
        return Fitted(refused=f"other programs came to use {share:.0%} of the cores meanwhile"), blocks
    return fitted(blocks), blocks


def calibrated(fleet: Fleet, config: Config) -> Fitted:
    """What is known of these workers; calibrated now where others were, in a run that is resumed."""
    if fleet.fitted.costs is None and not fleet.fitted.refused:
        fleet.fitted, _ = calibrate(fleet, config)
    return fleet.fitted


def run_blocks(fleet: Fleet, config: Config, repeats: int = 1) -> list[Block]:
    """Every size under the colocated policies, and hand-overs."""
    found = []
    for repeat in range(repeats):
        for policy in ("prefill_first", "chunked"):
            for index, trace in enumerate(_scripts(config, repeat)):
                chunk = CHUNKS[(index + repeat) % len(CHUNKS)]
                found.append(fleet.serve(config.layout(policy, chunk), trace))
        found.append(fleet.serve(config.layout("disaggregated"), _spaced(config, repeat)))
    return found


def fitted(blocks: Sequence[Block]) -> Fitted:
    """Costs and wires from what was seen. ValueError: too few steps."""
    return Fitted(fit(steps_of(blocks)), wires_of(blocks))


def steps_of(blocks: Sequence[Block]) -> list[tuple[Shape, float]]:
    return [
        (report.shape, report.ended - report.began)
        for block in blocks
        for _, report in block.seen.reports
        if report.ended > report.began
    ]


def wires_of(blocks: Sequence[Block]) -> Wires:
    """Of the blocks with hand-overs: their requests come one by one, so that no message waits for a step."""
    blocks = [block for block in blocks if block.seen.packs]

    def middle(values: list[float]) -> float:
        return quantile(values, 0.5) if values else 0.0

    pack = _line([pair for block in blocks for pair in block.seen.packs])
    travel = _line([pair for block in blocks for pair in block.seen.travels])
    store = _line([pair for block in blocks for _, report in block.seen.reports for pair in report.stored])
    return Wires(
        middle([seconds for block in blocks for seconds in block.seen.submits]),
        middle([seconds for block in blocks for seconds in block.seen.delivers]),
        *pack,
        *travel,
        *store,
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


def _scripts(config: Config, repeat: int) -> Iterator[list[Arrival]]:
    """Blocks that each begin when the one before is done; what is in one comes at once, the same on all
    workers."""
    drawn = random.Random(repeat)
    numbers = iter(range(10**9))
    longest = min(config.context, config.blocks * 16) - 16
    for length in LENGTHS:
        if length <= longest:
            yield [_request(numbers, drawn, length, OUTPUT) for _ in range(config.workers)]
    for batch in BATCHES:
        mixed = [min(longest, drawn.choice(LENGTHS[2:])) for _ in range(batch)]
        yield [_request(numbers, drawn, length, OUTPUT) for length in mixed for _ in range(config.workers)]


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


def best_chunk(config: Config, costs: Costs, wires: Wires, chunks: Sequence[int] = (32, 64, 128, 256)) -> int:
    """The chunk size under which most requests of the config's load meet their limits, the shortest gaps
    deciding between equals: in the simulator, on requests that are not measured."""
    from labs.serving.measures import measure
    from labs.serving.model import limits_of, load_of
    from labs.serving.simulator import simulate
    from labs.serving.trace import arrivals
    from labs.serving.weights import kv_bytes_per_token

    trace = arrivals(replace(load_of(config), seed=config.seed + 1), 200)
    limits, size = limits_of(config), kv_bytes_per_token(config.width, config.layers)
    found = {}
    for chunk in chunks:
        done = measure(simulate(trace, config.layout("chunked", chunk), costs, wires, size).served, limits)
        found[chunk] = (-round(done.attained, 2), done.itl_p99 + done.ttft_p50)
    return min(found, key=lambda chunk: found[chunk])
