"""What follows from several variants: how well the simulator told the live medians, and what a neighbour
costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from labs.lab import Interval, Measurement, Results, values_of
from labs.serving import live
from labs.serving.costs import Costs, Disturbance, Fitted, Wires
from labs.serving.layout import POLICIES
from labs.serving.measures import Measures
from labs.serving.model import LIVE, simulated
from labs.serving.ways import COSTS, NEIGHBOURS

CALIBRATION = f"{COSTS}/calibration"
MEDIANS = ("ttft_p50", "itl_p50")


def fitted(results: Results) -> Fitted | None:
    """What calibration recorded; None where it was refused."""
    found: list[dict[str, float]] = []
    for kind, prefix in ((Costs, "cost"), (Wires, "wire")):
        values = {
            each.name: values_of(results, CALIBRATION, f"{prefix}_{each.name}_s") for each in fields(kind)
        }
        if not all(values.values()):
            return None
        found.append({name: row[-1] for name, row in values.items()})
    disturbance: dict[str, Any] = {}
    for each in fields(Disturbance):
        row = values_of(results, CALIBRATION, f"disturbance_{each.name}")
        if row:
            disturbance[each.name] = tuple(row) if each.default == () else row[-1]
    return Fitted(Costs(**found[0]), Wires(**found[1]), Disturbance(**disturbance))


def live_address(policy: str) -> str:
    return f"{LIVE}/{policy}"


def void(results: Results, policy: str) -> bool:
    """Whether the load generator was too late for this policy's times to count."""
    late = values_of(results, live_address(policy), "late_fraction")
    return bool(late) and late[-1] > live.LATE


def of_blocks(results: Results, policy: str, key: str) -> Interval | None:
    """Median over blocks with their range. key: ``itl_max_s`` and the like."""
    row = sorted(values_of(results, live_address(policy), f"block_{key}"))
    if not row or void(results, policy):
        return None
    return Interval(row[len(row) // 2], row[0], row[-1])


def in_simulator(results: Results, policy: str) -> list[Measures]:
    """The blocks that were measured, in the simulator with fitted costs."""
    found = fitted(results)
    address = live_address(policy)
    budget = values_of(results, address, "budget_tokens")
    if found is None or not budget:
        return []
    count = len(values_of(results, address, "block_ttft_p50_s"))
    return [simulated(results.config, policy, block, found, int(budget[-1])) for block in range(1, count + 1)]


def told(results: Results, policy: str, key: str) -> Interval | None:
    """Measured over simulated, of the median ``key`` of each block: the median of these with their range."""
    if void(results, policy):
        return None
    measured = values_of(results, live_address(policy), f"block_{key}_s")
    ratios = sorted(
        mine / getattr(said, key)
        for mine, said in zip(measured, in_simulator(results, policy), strict=False)
        if getattr(said, key)  # a block in which nobody writes a second token has no gaps
    )
    if not ratios:
        return None
    return Interval(ratios[len(ratios) // 2], ratios[0], ratios[-1])


def penalty(results: Results) -> Interval | None:
    """A step that decodes while the neighbours do too, over the same step alone: medians over rounds of each
    round's median step, with the range that the rounds allow."""
    together, alone = (
        sorted(values_of(results, f"{NEIGHBOURS}/{name}", "round_decode_step_s"))
        for name in (live.TOGETHER, live.ALONE)
    )
    if not together or not alone:
        return None
    middle = together[len(together) // 2] / alone[len(alone) // 2]
    return Interval(middle, together[0] / alone[-1], together[-1] / alone[0])


def derive(results: Results) -> Sequence[Measurement]:
    """For each policy and median its value, and its ratio to what was simulated."""
    found = []
    for policy in POLICIES:
        for key in MEDIANS:
            rows = {f"{policy}_{key}_s": of_blocks(results, policy, f"{key}_s")}
            rows[f"{policy}_{key}_ratio"] = told(results, policy, key)
            found += [Measurement(name, row) for name, row in rows.items() if row is not None]
    return found
