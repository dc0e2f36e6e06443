"""The pictures: what each fault costs, foretold and measured; and the mark that it leaves in a profile."""

from __future__ import annotations

from collections.abc import Sequence

from labs.bottlenecks.claims import diagnosis, foretold, gain
from labs.bottlenecks.ways import FAULT, FIXED, GROUPS, HEALTHY
from labs.figure import NAN, Bars, Figure
from labs.lab import Results

MARKS = {
    "waits for input": "input",
    "no operator, for long": "gaps",
    "between operators": "calls",
    "small operators": "small",
    "passes over memory": "pointwise",
    "products in 32 bits": "wide_products",
    "only communicates": "exposed",
}
"""Words for the facts that are shares of the time and do not overlap."""


def figure(results: Results) -> Sequence[Figure]:
    return [each for each in (_gains(results), _marks(results)) if each is not None]


def _gains(results: Results) -> Figure | None:
    groups = [group for group in GROUPS if gain(results, group) is not None]
    if not groups:
        return None
    measured = [found.value if (found := gain(results, group)) else NAN for group in groups]
    said = [foretold(results, group) or NAN for group in groups]
    predicted = [_predicted(results, group) for group in groups]
    names = []
    for group in groups:
        told = diagnosis(results, f"{group}/{FAULT}")
        names.append(f"{group}: {told['bottleneck']} ({told['sure']})" if told else group)
    notes = [
        f"{group}: {text}" for group in groups if (text := results.info(f"{group}/{FIXED}", "difference"))
    ]
    return Bars(
        "What mending each fault gains (planted: diagnosed)",
        "times faster (x)",
        names,
        {"measured": measured, "foretold by the diagnosis": said, "predicted by formula": predicted},
        log=True,
        note="Reports before and after. " + " | ".join(notes),
    )


def _predicted(results: Results, group: str) -> float:
    fault = results.predicted(f"{group}/{FAULT}")
    fixed = results.predicted(f"{group}/{FIXED}")
    return fault / fixed if fault and fixed else NAN


def _marks(results: Results) -> Figure | None:
    addresses = [HEALTHY, *(f"{group}/{FAULT}" for group in GROUPS)]
    facts = {
        address: found["facts"] for address in addresses if (found := diagnosis(results, address)) is not None
    }
    if not facts:
        return None
    series = {
        words: [max(0.0, float(one.get(name) or 0.0)) for one in facts.values()]
        for words, name in MARKS.items()
    }
    others = [
        f"{address}: {100 * one['system']:.0f} % of CPU seconds in the kernel, {one['threads']} threads, "
        f"memory {100 * (one.get('memory') or 0):.0f} % full"
        for address, one in facts.items()
        if one.get("system") is not None
    ]
    return Bars(
        "The mark of each fault in a profile",
        "share of the step's time (ratio)",
        list(facts),
        series,
        stacked=True,
        note="The rest is in fused operations and 16-bit products. Beside the trace: " + "; ".join(others),
    )
