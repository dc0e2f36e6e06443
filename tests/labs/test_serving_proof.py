"""The simulator against the real workers, on rates that no cost was fitted to: ``make proof``.

1 000 requests for each policy and rate, the policies interleaved in blocks, calibrations between them; about
a quarter of an hour on two cores that have nothing else to do. The costs are those of the calibrations alone,
whose requests have other lengths and rates. Calibration is refused on a busy host, and then so is the proof.
"""

import itertools
import os
import time

import pytest

from labs.concurrency import cluster
from labs.serving import calibrating, fleet, live
from labs.serving.config import Config
from labs.serving.layout import POLICIES
from labs.serving.measures import measure, quantile
from labs.serving.model import limits_of
from labs.serving.simulator import simulate
from labs.serving.trace import Load, arrivals
from labs.serving.weights import kv_bytes_per_token
from labs.unrecorded import Unrecorded

pytestmark = [pytest.mark.proof, pytest.mark.ray, pytest.mark.timeout(5400)]
CONFIG = Config()
RATES = (6.0, 12.0)
REQUESTS = int(os.environ.get("PERFLAB_PROOF_REQUESTS", "1000"))
BLOCK = 50
CALIBRATIONS = 4
DIFFERENT = 0.15


@pytest.fixture(scope="module")
def cells():
    """(policy, rate) -> (measured, simulated)."""
    there = fleet.fleet(CONFIG, Unrecorded(time.perf_counter))
    try:
        seen = calibrated(there, 0)
        chunk = calibrating.best_chunk(CONFIG, calibrating.fitted(seen))
        size = kv_bytes_per_token(CONFIG.width, CONFIG.layers)
        layouts = {policy: CONFIG.layout(policy, chunk) for policy in POLICIES}
        measured = {cell: [] for cell in itertools.product(POLICIES, RATES)}
        traces = {rate: [] for rate in RATES}
        blocks = range(0, REQUESTS, BLOCK)
        for index, first in enumerate(blocks):
            if index and index % -(-len(blocks) // CALIBRATIONS) == 0:
                seen += calibrated(there, index)
            for rate in RATES:
                trace = arrivals(Load(rate, CONFIG.prompt, CONFIG.output), BLOCK, first)
                traces[rate].append(trace)
                for policy, layout in layouts.items():
                    block = there.serve(layout, trace)
                    assert block.leaked == 0
                    measured[policy, rate].append(block.served)
        found = calibrating.fitted(seen)
        costs, wires, disturbance = found.costs, found.wires, found.disturbance
        said = {
            (policy, rate): [
                simulate(trace, layouts[policy], costs, wires, size, disturbance, index).served
                for index, trace in enumerate(traces[rate])
            ]
            for policy, rate in measured
        }
        for cell, rows in measured.items():
            late = quantile([each.submitted - each.due for row in rows for each in row], 0.5)
            first_token = quantile([each.ttft for row in rows for each in row], 0.5)
            assert late < live.LATE * first_token, f"the load generator was late for {cell}: the run is void"
        yield {cell: (together(measured[cell]), together(said[cell])) for cell in measured}
    finally:
        fleet.shut_down()
        cluster.shut_down()


def calibrated(there, repeat):
    """Blocks of a calibration; several are spread over the run, since a host that others share changes."""
    found, blocks = calibrating.calibrate(there, CONFIG, first=repeat)
    if isinstance(found, str):
        pytest.skip(f"calibration is refused: {found}")
    return blocks


def together(blocks):
    """Measures of all requests; how many met both limits as the mean of the blocks' rates."""
    limits = limits_of(CONFIG)
    parts = [measure(row, limits) for row in blocks]
    whole = measure([each for row in blocks for each in row], limits)
    return whole, sum(part.met for part in parts) / len(parts)


def rows(cells):
    for (policy, rate), ((mine, good), (other, said)) in cells.items():
        for key in ("ttft_p50", "itl_p50", "ttft_p99", "itl_p99"):
            yield policy, rate, key, getattr(mine, key) / getattr(other, key)
        yield policy, rate, "met", good / said


def test_medians_tails_and_how_many_meet_the_limits_are_told(cells):
    bounds = dict(ttft_p50=0.10, itl_p50=0.10, ttft_p99=0.25, itl_p99=0.25, met=0.15)
    wrong = []
    for policy, rate, key, ratio in rows(cells):
        print(f"{policy:14} {rate:4g}/s {key:9} measured / simulated {ratio:.3f} (within {bounds[key]:.0%})")
        if not 1 - bounds[key] <= ratio <= 1 + bounds[key]:
            wrong.append((policy, rate, key, ratio))
    assert wrong == []


def test_the_right_policy_wins_where_they_differ(cells):
    right = total = 0
    for rate in RATES:
        for key in ("ttft_p50", "itl_p50", "ttft_p99", "itl_p99"):
            for one, other in itertools.combinations(POLICIES, 2):
                mine, said = (
                    [getattr(cells[p, rate][side][0], key) for p in (one, other)] for side in (0, 1)
                )
                if abs(mine[0] / mine[1] - 1) > DIFFERENT:
                    total += 1
                    right += (mine[0] < mine[1]) == (said[0] < said[1])
        for one, other in itertools.combinations(POLICIES, 2):
            mine, said = ([cells[p, rate][side][1] for p in (one, other)] for side in (0, 1))
            if abs(mine[0] / mine[1] - 1) > DIFFERENT:
                total += 1
                right += (mine[0] < mine[1]) == (said[0] < said[1])
    print(f"{right} of {total} pairs that differ by more than {DIFFERENT:.0%}")
    assert total
    assert right >= 0.9 * total
