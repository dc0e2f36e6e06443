"""Proof: every way against the same program in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from labs.lab import Check
from labs.programming_models import behaviours, chain
from labs.programming_models.config import Config
from labs.programming_models.refusals import Refused
from labs.programming_models.ways import NETWORKS

ROUNDING = 2.0**-24  # relative error of a float32 operation, at most


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest error of each output, relative to the reference's largest number.

    Tolerance: a dozen roundings in the chain; in the networks sums of ``width`` products, whose roundings
    grow with the root of their number, through a few layers. A refusal has no result to check: that it was to
    be expected is predicted, and counted.
    """
    references: dict[str, list[Any]] = {}
    found = []
    for address, output in outputs.items():
        if isinstance(output, Refused):
            continue
        group = address.partition("/")[0]
        if group not in references:
            references[group] = _reference(config, group)
        error = _error(output, references[group])
        found.append(Check(address, error, tolerance(config, group), "the program in float64"))
    return found


def tolerance(config: Config, group: str) -> float:
    if group.startswith("chain") or group in behaviours.PROGRAMS:
        return 2 * chain.OPERATIONS * ROUNDING
    return 16 * ROUNDING * math.sqrt(NETWORKS[group].terms(config))


def _reference(config: Config, group: str) -> list[Any]:
    if group in behaviours.PROGRAMS:
        return behaviours.reference(config, group)
    if group in NETWORKS:
        return NETWORKS[group].reference(config)
    return [chain.reference(int(group.removeprefix("chain_")))]


def _error(output: object, expected: list[Any]) -> float:
    """Relative to the largest number of each part; infinite for another number or shape of parts."""
    import numpy

    parts = output if isinstance(output, (list, tuple)) else [output]
    if len(parts) != len(expected):
        return math.inf
    worst = 0.0
    for part, exact in zip(parts, expected, strict=True):
        if hasattr(part, "detach"):
            part = part.detach().cpu()
        values = numpy.asarray(part, numpy.float64)
        exact = numpy.asarray(exact)
        if values.shape == (1, *exact.shape):
            values = values[0]  # a module's batch of one
        if values.shape != exact.shape:
            return math.inf
        if exact.size:
            error = float(
                numpy.max(numpy.abs(values - exact)) / max(float(numpy.max(numpy.abs(exact))), 1e-30)
            )
            if math.isnan(error):
                return math.nan
            worst = max(worst, error)
    return worst
