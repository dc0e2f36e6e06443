"""The steps that are timed: blocks of load, calibration, and what a neighbour costs. They record what they
saw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

from labs.lab import Recorder
from labs.serving import calibrating
from labs.serving.config import NEIGHBOUR_OUTPUT, NEIGHBOUR_PROMPT, NEIGHBOURS, Config
from labs.serving.costs import Fitted, residual
from labs.serving.fleet import Block, fleet
from labs.serving.measures import little, measure, quantile
from labs.serving.model import limits_of, load_of
from labs.serving.request import Request
from labs.serving.trace import Arrival, arrivals
from labs.serving.weights import VOCABULARY

LATE = 0.05  # of the median time to the first token: a generator that is later makes the run void
ALONE, TOGETHER = "alone", "together"

Step = Callable[[], object]


def live(policy: str) -> Callable[[Config, Recorder], Step]:
    """Setup of a policy under load: each call serves the next block, the same for every policy."""

    def setup(config: Config, recorder: Recorder) -> Step:
        return LiveStep(config, recorder, policy)

    return setup


class LiveStep:
    """The first call is the cold one and is in no figure. All later ones are, also those of the warm-up."""

    def __init__(self, config: Config, recorder: Recorder, policy: str) -> None:
        self.config, self.recorder = config, recorder
        self.fleet = fleet(config, recorder)
        chunk = 0
        if policy == "chunked":
            found = calibrating.calibrated(self.fleet, config)
            chunk = calibrating.best_chunk(config, found) if found else 0
        self.layout = config.layout(policy, chunk)
        self.calls, self.blocks = 0, list[Block]()

    def __call__(self) -> dict[str, object]:
        trace = arrivals(load_of(self.config), self.config.requests, self.calls * self.config.requests)
        block = self.fleet.serve(self.layout, trace)
        if self.calls:
            self.blocks.append(block)
            self._record()
        self.calls += 1
        return proof_of(block)

    def _record(self) -> None:
        served = [each for block in self.blocks for each in block.served]
        limits, note = limits_of(self.config), self.recorder.record
        for each in served:
            note("ttft", each.ttft, "s")
        parts = [measure(block.served, limits) for block in self.blocks]
        for part in parts:
            note("block_ttft_p50", part.ttft_p50, "s")
            note("block_itl_p50", part.itl_p50, "s")
            note("block_itl_p99", part.itl_p99, "s")
            note("block_itl_max", part.itl_max, "s")
            note("block_met", part.met, "requests_per_s")
            note("block_throughput", part.throughput, "tokens_per_s")
        whole = measure(served, limits)
        for key in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_max"):
            note(key, getattr(whole, key), "s")
        note("attained", whole.attained, "fraction")
        late = quantile([each.submitted - each.due for each in served], 0.5)
        note("late", late / whole.ttft_p50, "fraction")
        note("little_off", max(_little(block) for block in self.blocks), "fraction")
        held = [r.held for block in self.blocks for _, r in block.seen.reports if r.ended > r.began]
        note("occupancy", sum(held) / max(1, len(held)) / self.layout.blocks, "fraction")
        note("budget", self.layout.budget, "tokens")
        note("handed", sum(block.counters.handed_bytes for block in self.blocks), "B")
        transfers = [trip.came - trip.sent for block in self.blocks for trip in block.seen.trips if trip.size]
        if transfers:
            note("hand_over_p50", quantile(transfers, 0.5), "s")


def _little(block: Block) -> float:
    return little(block.served, block.seen.in_house, block.span)


def proof_of(block: Block) -> dict[str, object]:
    """Tokens of each request and blocks that were not given back."""
    return {"tokens": {each.number: each.tokens for each in block.served}, "leaked": block.leaked}


def calibration(config: Config, recorder: Recorder) -> Step:
    """Fits the costs and leaves them with the fleet, for the chunk size and the simulations."""
    there = fleet(config, recorder)
    recorder.record("start", there.start_s, "s")

    def step() -> dict[str, object]:
        found, blocks = calibrating.calibrate(there, config)
        there.fitted = found
        recorder.record("refused", float(not isinstance(found, Fitted)), "")
        if isinstance(found, Fitted):
            for name, value in asdict(found.costs).items():
                recorder.record(f"cost_{name}", value, "s")
            for name, value in asdict(found.wires).items():
                recorder.record(f"wire_{name}", value, "s")
            for name, value in asdict(found.disturbance).items():
                for each in value if isinstance(value, tuple) else (value,):
                    recorder.record(f"disturbance_{name}", each, "")
            steps = calibrating.steps_of(blocks)
            recorder.record("residual", residual(found.costs, found.disturbance, steps), "fraction")
        return {"tokens": {}, "leaked": sum(block.leaked for block in blocks)}

    return step


def neighbours(config: Config, recorder: Recorder, together: bool) -> Step:
    """A batch of sequences on one worker while the others rest, or the same batch on each."""
    there = fleet(config, recorder)
    trace = neighbour_trace(config, config.workers if together else 1)
    rounds: list[float] = []

    def step() -> dict[str, object]:
        block = there.serve(config.layout("chunked", NEIGHBOURS + 64), trace, only=None if together else 0)
        steps = _decode_steps(block)  # none where the machine was so busy that they never decoded all at once
        rounds.append(quantile(steps, 0.5) if steps else math.nan)
        for seconds in rounds[1:]:  # the first call is the cold one
            if not math.isnan(seconds):
                recorder.record("round_decode_step", seconds, "s")
        return proof_of(block)

    return step


def _decode_steps(block: Block) -> list[float]:
    """Seconds of the steps that only decode all sequences of a worker."""
    return [
        report.ended - report.began
        for _, report in block.seen.reports
        if report.shape.decodes == NEIGHBOURS and not report.shape.prompts
    ]


def neighbour_trace(config: Config, workers: int) -> Sequence[Arrival]:
    drawn = random.Random(config.seed)
    prompts = [tuple(drawn.choices(range(VOCABULARY), k=NEIGHBOUR_PROMPT)) for _ in range(NEIGHBOURS)]
    return [
        Arrival(0.0, Request(number * workers + worker, prompt, NEIGHBOUR_OUTPUT))
        for number, prompt in enumerate(prompts)
        for worker in range(workers)
    ]
