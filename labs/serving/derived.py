"""What follows from several variants: how well the simulator told the live medians, and what a neighbour
costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from labs.lab import Interval, Measurement, Results
from labs.serving import live
from labs.serving.costs import Costs, Wires
from labs.serving.layout import POLICIES
from labs.serving.measures import Measures
from labs.serving.model import LIVE, simulated
from labs.serving.ways import COSTS, NEIGHBOURS

CALIBRATION = f"{COSTS}/calibration"
MEDIANS = ("ttft_p50", "itl_p50")


def fitted(results: Results) -> tuple[Costs, Wires] | None:
    """What calibration recorded; None where it was refused."""
    if not results.has(CALIBRATION):
        return None
    found: list[dict[str, float]] = []
    for kind, prefix in ((Costs, "cost"), (Wires, "wire")):
        values = {
            each.name: results.recorded(CALIBRATION, f"{prefix}_{each.name}_s") for each in fields(kind)
        }
        if not all(values.values()):
            return None
        found.append({name: row[-1] for name, row in values.items()})
    return Costs(**found[0]), Wires(**found[1])


def live_address(policy: str) -> str:
    return f"{LIVE}/{policy}"


def void(results: Results, policy: str) -> bool:
    """Whether the load generator was too late for this policy's times to count."""
    late = results.recorded(live_address(policy), "late_fraction")
    return bool(late) and late[-1] > live.LATE


def of_blocks(results: Results, policy: str, key: str) -> Interval | None:
    """Median over blocks with their range. key: ``itl_max_s`` and the like."""
    address = live_address(policy)
    row = sorted(results.recorded(address, f"block_{key}")) if results.has(address) else []
    if not row or void(results, policy):
        return None
    return Interval(row[len(row) // 2], row[0], row[-1])


def in_simulator(results: Results, policy: str) -> list[Measures]:
    """The blocks that were measured, in the simulator with fitted costs."""
    costs = fitted(results)
    address = live_address(policy)
    if costs is None or not results.has(address):
        return []
    count = len(results.recorded(address, "block_ttft_p50_s"))
    budget = results.recorded(address, "budget_tokens")
    chunk = int(budget[-1]) if budget else 0
    return [simulated(results.config, policy, block, *costs, chunk) for block in range(1, count + 1)]


def told(results: Results, policy: str, key: str) -> Interval | None:
    """Measured over simulated, of the median ``key`` of each block: the median of these with their range."""
    if void(results, policy):
        return None
    measured = results.recorded(live_address(policy), f"block_{key}_s")
    ratios = sorted(
        mine / getattr(said, key) for mine, said in zip(measured, in_simulator(results, policy), strict=False)
    )
    if not ratios:
        return None
    return Interval(ratios[len(ratios) // 2], ratios[0], ratios[-1])


def penalty(results: Results) -> Interval | None:
    """A step that decodes while the neighbours do too, over the same step alone."""
    pair = f"{NEIGHBOURS}/{live.TOGETHER}", f"{NEIGHBOURS}/{live.ALONE}"
    return results.ratio(*pair) if results.has(*pair) else None


def derive(results: Results) -> Sequence[Measurement]:
    """The ratio for each policy and median."""
    found = []
    for policy in POLICIES:
        for key in MEDIANS:
            ratio = told(results, policy, key)
            if ratio is not None:
                found.append(Measurement(f"{policy}_{key}_ratio", ratio))
    return found
