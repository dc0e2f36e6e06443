"""Proof: the parameters after a few steps are those of one process without any strategy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from labs.data_parallel import straggling
from labs.data_parallel.config import Config
from labs.data_parallel.training import LEARNING_RATE, Training, adamw, batches, gpt
from labs.data_parallel.ways import PROOF_STEPS
from labs.lab import Check

if TYPE_CHECKING:
    import torch


SHARE = 0.02


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest difference of a parameter.

    Tolerance: Adam moves a parameter by the learning rate at most in a step, in the direction of its
    gradient, whatever the gradient's size; where that is as small as its own rounding, summing in another
    order may change the whole movement. So a share of what the steps have moved is allowed (``SHARE``).
    """
    import torch

    references: dict[str, torch.Tensor] = {}
    found = []
    for address, output in outputs.items():
        kind = _kind(address)
        if kind not in references:
            references[kind] = reference(config, kind)
        expected = references[kind]
        tensor = torch.as_tensor(output) if output is not None else None
        if tensor is None or tensor.shape != expected.shape:
            raise TypeError(f"{address} returned no vector of {len(expected)} parameters")
        error = float((tensor.double() - expected).abs().max())
        found.append(Check(address, error, tolerance(config, kind), _against(kind)))
    return found


def tolerance(config: Config, kind: str) -> float:
    if kind in straggling.WAYS:
        return SHARE * straggling.RATE * config.local_steps
    return SHARE * LEARNING_RATE * PROOF_STEPS


def _kind(address: str) -> str:
    group, _, name = address.partition("/")
    if group == "straggler":
        return name
    return "share" if name == "single" else "whole"


def _against(kind: str) -> str:
    return {
        "share": "one process in float64, the share of rank 0",
        "local_sgd": "the ranks' models one after the other in float64, averaged",
    }.get(kind, "one process in float64, the batch of all ranks")


@cache
def reference(config: Config, kind: str) -> torch.Tensor:
    """Parameters in float64 after ``PROOF_STEPS`` steps (a straggler's: after ``local_steps``)."""
    import torch

    if kind == "local_sgd":
        ranks = [_small(config, [rank]) for rank in range(config.ranks)]
        return torch.stack(ranks).mean(0)
    if kind == "synchronous":
        return _small(config, list(range(config.ranks)))
    drawn = batches(config, 0, config.ranks if kind == "share" else 1)
    model = gpt(config.gpt()).double()
    training = Training(model, model, torch.optim.AdamW(model.parameters(), **adamw()), drawn)
    for _ in range(PROOF_STEPS):
        training.step()
    return training.parameters()


def _small(config: Config, ranks: list[int]) -> torch.Tensor:
    """The straggler's model after ``local_steps`` steps on the shares of ``ranks``."""
    import torch

    model = gpt(config.small_gpt()).double()
    drawn = [straggling.share(config, rank) for rank in ranks]
    optimizer = straggling.optimizer_of(model)

    def batch_of(step: int) -> tuple[Any, Any]:
        tokens, targets = zip(*(share[step] for share in drawn), strict=True)
        return torch.cat(tokens), torch.cat(targets)

    whole = [batch_of(step) for step in range(1, config.local_steps + 1)]
    training = Training(model, model, optimizer, whole)
    for _ in range(config.local_steps):
        training.step()
    return straggling.vector(model)
