"""Beyond what is at hand: goodput of every layout in the simulator, over lengths, limits, workers, links and
prefixes.

Goodput is the highest rate at which 90 % of requests meet both limits (Zhong et al. 2024). Limits are
multiples of what a request takes when it is alone, so that they mean the same for any costs. Costs are means
while all workers are at work, as they are at the rates that are looked for. The colocated
rival gets the better of whole prompts and several chunk sizes; a disaggregated layout of more than two
workers the best of several ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from labs.lab import Recorder
from labs.serving.calibrating import calibrated
from labs.serving.config import WHOLE_PROMPTS, Config
from labs.serving.costs import Costs, Wires, crowded
from labs.serving.engine import Shape
from labs.serving.fleet import Fleet, fleet
from labs.serving.layout import Layout
from labs.serving.measures import Limits
from labs.serving.model import costs_of, wires_of
from labs.serving.simulator import simulate
from labs.serving.trace import Load, arrivals
from labs.serving.weights import kv_bytes_per_token

ATTAINED = 0.9
CHUNKS = (64, 128, 256)
LIMITS = {"tight": (3.0, 2.5), "loose": (10.0, 6.0)}
"""How often what a lone request takes: to its first token, and between tokens."""
STEPS = 6  # of the search: each halves the logarithm of what is left
LASTS = 5  # of a trace, in limits to the first token: long enough for a queue to outgrow the limit
WIDEST = 64  # the search begins with rates from capacity / WIDEST to capacity
GRAIN = WIDEST ** (1 / 2**STEPS) - 1
"""A goodput that is found lies so much, as a share, below the least rate that was seen to fail."""
MOST_DOUBLINGS = 10  # beyond capacity
COLOCATED, DISAGGREGATED = "colocated", "disaggregated"


@dataclass(frozen=True)
class Case:
    """What is served by what. prefill: workers that read in a disaggregated layout, 0 for the best of
    several. requests: for each worker."""

    prompt: int
    output: int
    limits: str = "loose"
    workers: int = 2
    common: float = 0.0
    prefill: int = 0
    requests: int = 60
    seed: int = 0

    @property
    def key(self) -> str:
        return f"prompt{self.prompt}_output{self.output}_{self.limits}"


def lone(case: Case, costs: Costs) -> tuple[float, float]:
    """Seconds of reading a mean prompt, and of the first token written behind it: the longest gap."""
    new = case.prompt
    reading = costs.seconds(Shape(prompts=1, new=new, pairs=new * (new + 1) // 2, reading_anew=1))
    return reading, costs.seconds(Shape(decodes=1, context=new + case.output // 2, writing_anew=1))


def limits_of(case: Case, costs: Costs) -> Limits:
    factors, times = LIMITS[case.limits], lone(case, costs)
    return Limits(factors[0] * (times[0] + times[1]), factors[1] * times[1])


def layouts(case: Case, config: Config) -> dict[str, list[Layout]]:
    """Of both kinds, the same workers and memory."""
    base = replace(config.layout("prefill_first"), workers=case.workers, prefill=1)
    colocated = [base] + [replace(base, policy="chunked", budget=chunk) for chunk in CHUNKS]
    tried = [case.prefill] if case.prefill else [round(case.workers * share) for share in (0.25, 0.5, 0.75)]
    shares = {max(1, min(case.workers - 1, prefill)) for prefill in tried}
    apart = [
        replace(base, policy=DISAGGREGATED, prefill=prefill, budget=WHOLE_PROMPTS)
        for prefill in sorted(shares)
    ]
    return {COLOCATED: colocated, DISAGGREGATED: apart}


@lru_cache(maxsize=4096)
def goodput(case: Case, layout: Layout, config: Config, costs: Costs, wires: Wires) -> float:
    """Requests/s, to ``GRAIN``; 0 where not even the lowest rate attains it."""
    size = kv_bytes_per_token(config.width, config.layers)
    limits = limits_of(case, costs)
    reading, writing = lone(case, costs)
    capacity = 2 * case.workers / (reading + case.output * writing / 4)

    def attains(rate: float) -> bool:
        count = max(case.requests * case.workers, int(LASTS * limits.ttft * rate))
        trace = arrivals(Load(rate, case.prompt, case.output, case.common, case.seed), count)
        done = simulate(trace, layout, costs, wires, size).served
        return sum(limits.met(each) for each in done) >= ATTAINED * len(done)

    low, high = capacity / WIDEST, capacity
    if not attains(low):
        return 0.0
    for _ in range(MOST_DOUBLINGS):  # what writes in large batches serves more than that
        if not attains(high):
            break
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attains(middle) else (low, middle)
    return low


def best(case: Case, config: Config, costs: Costs, wires: Wires) -> dict[str, float]:
    """The best goodput of each kind of layout, requests/s. What is equal in several cases is searched once:
    colocated layouts send nothing."""
    same = replace(case, prefill=0)
    local = replace(wires, pack=0.0, pack_byte=0.0, travel=0.0, travel_byte=0.0, store=0.0, store_byte=0.0)
    return {
        kind: max(
            goodput(same, layout, config, costs, wires if layout.disaggregated else local) for layout in row
        )
        for kind, row in layouts(case, config).items()
    }


# --- what is swept -----------------------------------------------------------------------------------


def map_cases(config: Config) -> list[Case]:
    """Prompt x output x limits; fewer of each, and shorter traces, where a block of load is short."""
    small = config.requests < 32
    prompts, outputs = ((64, 384), (8, 96)) if small else ((32, 128, 512), (8, 64))
    limits = ("loose",) if small else tuple(LIMITS)
    count = 30 if small else 40
    longest = min(config.context, config.blocks * 16)
    return [
        Case(prompt, output, limit, requests=count)
        for limit in limits
        for prompt in prompts
        for output in outputs
        if 1.5 * (prompt + output) < longest
    ]


def sensitivity(config: Config, costs: Costs, wires: Wires) -> Iterator[tuple[str, Costs, Wires, int]]:
    """(what is changed, costs, wires, seed): the map is only as good as it is steady under these."""
    yield "as measured", costs, wires, 0
    yield "another seed", costs, wires, 1
    if config.requests >= 32:
        yield "reading 25 % dearer", replace(costs, new=1.25 * costs.new, pairs=1.25 * costs.pairs), wires, 0
        yield (
            "writing 25 % dearer",
            replace(costs, decodes=1.25 * costs.decodes, context=1.25 * costs.context),
            wires,
            0,
        )


def sweep_cases(config: Config) -> list[tuple[str, float, Case, float]]:
    """(sweep, x, case, bandwidth factor): workers, prefix hits and link, one at a time around the lab's
    load."""
    if config.requests < 32:
        return []
    base = Case(config.prompt, config.output, requests=15)
    found = [("workers", float(n), replace(base, workers=n), 1.0) for n in (8, 16, 64)]
    found += [("prefill", float(n), replace(base, workers=8, prefill=n), 1.0) for n in range(1, 8)]
    found += [("common", share, replace(base, workers=8, common=share), 1.0) for share in (0.0, 0.25, 0.45)]
    found += [("link", factor, replace(base, workers=8), factor) for factor in (0.01, 0.1, 1.0, 10.0)]
    return found


def winner_map(config: Config, recorder: Recorder) -> Callable[[], object]:
    """Records the goodput of both kinds for each case, under each change: ``KEY_colocated`` and
    ``KEY_disaggregated``."""
    there = fleet(config, recorder)

    def step() -> dict[str, object]:
        costs, wires = _costs(config, there, recorder)
        for _, changed, over, seed in sensitivity(config, costs, wires):
            for case in map_cases(config):
                for kind, rate in best(replace(case, seed=seed), config, changed, over).items():
                    recorder.record(f"{case.key}_{kind}", rate, "requests_per_s")
        return {"tokens": {}, "leaked": 0}

    return step


def sweeps(config: Config, recorder: Recorder) -> Callable[[], object]:
    """Records x and goodput of both kinds for each sweep."""
    there = fleet(config, recorder)

    def step() -> dict[str, object]:
        costs, wires = _costs(config, there, recorder)
        for sweep, x, case, factor in sweep_cases(config):
            slower = replace(
                wires, pack_byte=wires.pack_byte / factor, travel_byte=wires.travel_byte / factor
            )
            found = best(case, config, costs, slower)
            recorder.record(f"{sweep}_x", x, "")
            for kind, rate in found.items():
                recorder.record(f"{sweep}_{kind}", rate, "requests_per_s")
        return {"tokens": {}, "leaked": 0}

    return step


def _costs(config: Config, there: Fleet, recorder: Recorder) -> tuple[Costs, Wires]:
    """Those that calibration fitted, or else those of the machine's constants."""
    from labs.calibration import current
    from labs.machine import load_cached

    found = calibrated(there, config)
    recorder.record("fitted", float(found is not None), "")
    if found is None:
        machine = load_cached() or current()[0]
        return costs_of(config, machine), wires_of(machine)
    return crowded(found.costs, found.disturbance), found.wires
