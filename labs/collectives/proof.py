"""Proof: what every rank got in every way, against a plain computation, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labs.collectives import overlap
from labs.collectives.calls import material
from labs.collectives.config import Config
from labs.collectives.inputs import expected
from labs.collectives.ways import OPERATIONS, SWEEP
from labs.lab import Check


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest error on any rank. Tolerance 0: integers add up exactly in float32, in any order."""
    found = []
    for address, output in outputs.items():
        wanted = _expected(config, address)
        if not isinstance(output, list) or len(output) != len(wanted):
            raise TypeError(f"{address} returned no list of {len(wanted)} ranks' results")
        errors = [
            _error(f"{address}, rank {rank}", len(wanted), got, want)
            for rank, (got, want) in enumerate(zip(output, wanted, strict=True))
        ]
        error = float("nan") if any(each != each for each in errors) else max(errors)
        found.append(Check(address, error, 0.0, "a plain computation, on every rank"))
    return found


def _error(where: str, ranks: int, got: Any, want: Any) -> float:
    import torch

    if want is None:
        if got is not None:
            raise TypeError(f"{where} has a result, but only the root should")
        return 0.0
    want = material(want, ranks)
    if got is None or tuple(got.shape) != tuple(want.shape):
        raise TypeError(f"{where} returned no tensor of shape {tuple(want.shape)}")
    return float((torch.as_tensor(got).double() - want).abs().max())


def _expected(config: Config, address: str) -> list[Any]:
    group, _, name = address.partition("/")
    if group.startswith("overlap_"):
        return overlap.expected(config, name)
    if group == SWEEP:
        kib, ranks, operation = int(name.rpartition("_")[2]), config.ranks, "all_reduce"
    elif group in OPERATIONS:
        kib, ranks, operation = config.size_KiB, config.ranks, group
    else:
        kib, ranks, operation = config.size_KiB, config.more_ranks, "all_reduce"
    return expected(operation, ranks, config.elements(ranks, kib))
