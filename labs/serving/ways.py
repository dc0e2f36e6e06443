"""What is run, in groups.

``costs``      calibration: every worker at once, on requests that are not the load; once
``neighbours`` what workers take from each other: one decodes alone, or all at the same time
``live``       the same blocks of load under each policy
``simulated``  the winner map and sweeps, in the simulator; once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from labs.lab import Variant
from labs.serving import extrapolation, live
from labs.serving.config import Config
from labs.serving.layout import POLICIES
from labs.serving.model import LIVE

COSTS, NEIGHBOURS, SIMULATED = "costs", "neighbours", "simulated"
ROUNDS = 3  # of a block of load under each policy, beside the warm-up's


def variants(config: Config) -> Sequence[Variant]:
    """Unavailable without Ray."""
    from labs.concurrency import cluster

    no_ray = cluster.unavailable()
    found = [Variant(COSTS, "calibration", live.calibration, max_rounds=1)]
    for name, together in ((live.ALONE, False), (live.TOGETHER, True)):
        found.append(Variant(NEIGHBOURS, name, partial(live.neighbours, together=together), max_rounds=4))
    found += [Variant(LIVE, policy, live.live(policy), max_rounds=ROUNDS) for policy in POLICIES]
    found.append(Variant(SIMULATED, "winner_map", extrapolation.winner_map, max_rounds=1))
    if extrapolation.sweep_cases(config):
        found.append(Variant(SIMULATED, "sweeps", extrapolation.sweeps, max_rounds=1))
    return [replace(each, unavailable=no_ray) for each in found] if no_ray else found
