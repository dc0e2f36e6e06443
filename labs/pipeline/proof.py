"""Proof: losses and gradients are those of one process in float64 with the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from labs.lab import Check
from labs.pipeline import real_stages, stage_times
from labs.pipeline.config import Config
from labs.pipeline.running import VIRTUAL, proof_of

if TYPE_CHECKING:
    import torch

TOLERANCE = 2e-5  # float32 gradients of these models are below 1
AGAINST = "one process in float64, the whole batch"


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest difference in losses and gradients of rank 0."""
    import torch

    found = []
    for address, output in outputs.items():
        group, _, name = address.partition("/")
        expected = _expected(config, group, name)
        tensor = torch.as_tensor(output) if output is not None else None
        if tensor is None or tensor.shape != expected.shape:
            raise TypeError(f"{address} returned no vector of {len(expected)} losses and gradients")
        error = float((tensor.double() - expected).abs().max())
        found.append(Check(address, error, TOLERANCE, AGAINST))
    return found


def _expected(config: Config, group: str, name: str) -> torch.Tensor:
    """What the variant has to return."""
    import torch

    if group == stage_times.GROUP:
        losses = _reference(config, name, 1, 2 * stage_times.EACH)[1]
        return losses.repeat(len(stage_times.cuts(config)))
    world_size = config.ranks if group == VIRTUAL else config.stages
    schedule = config.schedule_of(name, world_size)
    stages, losses = _reference(config, group, schedule.stages, schedule.microbatches)
    mine = torch.nn.ModuleDict({str(stage): stages[stage] for stage in schedule.stages_of(0)})
    return proof_of(losses, list(mine.parameters()))


@cache
def _reference(config: Config, group: str, count: int, microbatches: int) -> tuple[list[Any], torch.Tensor]:
    """(stages with their gradients, what each micro-batch adds to the loss), in float64."""
    import torch

    from parallel.pipeline_batch import split_batch

    inputs: Any
    if group == VIRTUAL:
        from parallel.virtual import virtual_stages

        stages = virtual_stages(count, 0.0, 0.0, 0.0)
        inputs = torch.arange(1.0, microbatches + 1).view(-1, 1).double()
        targets, loss = torch.zeros_like(inputs), torch.nn.functional.mse_loss
    else:
        stages = real_stages.stages_of(config, group, count)
        inputs, targets = real_stages.batch(config, group, microbatches)
        loss = real_stages.loss
    torch.nn.ModuleList(stages).double()
    parts, sizes = split_batch(inputs, microbatches, "inputs")
    wanted, _ = split_batch(targets, microbatches, "targets")
    losses = []
    for part, target, size in zip(parts, wanted, sizes, strict=True):
        for stage in stages:
            part = stage(*part) if isinstance(part, tuple) else stage(part)
        losses.append(loss(part, target) * size / sum(sizes))
        losses[-1].backward()
    return stages, torch.stack(losses).detach()
