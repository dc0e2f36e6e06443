"""What a step of a pipeline communicates, exactly, before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from parallel.pipeline_messages import HEADER_BYTES, Boundary, boundary_of, messages
from parallel.schedules import Kind, Schedule, without_communication


def boundaries_of(stages: Sequence[nn.Module], inputs: Any) -> dict[int, Boundary]:
    """What each stage gives to the next, by stage, found by one forward of ``inputs`` through all of them."""
    found: dict[int, Boundary] = {}
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    samples = len(tensors[0])
    with torch.enable_grad():
        for index, stage in enumerate(stages[:-1]):
            outputs = stage(*tensors)
            tensors = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
            found[index] = boundary_of(tensors, samples, index)
            tensors = tuple(
                one.detach().requires_grad_(shape.has_gradient)
                for one, shape in zip(tensors, found[index], strict=True)
            )
    return found


def predict_communication(
    schedule: Schedule,
    rank: int,
    boundaries: Mapping[int, Boundary],
    samples: Sequence[int],
    *,
    is_first_step: bool = False,
    synchronised: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Payload bytes of ``rank`` in one step, as ``parallel.link`` counts them.

    send: outputs to later stages on other ranks and gradients to earlier ones, in the first step of all a
        header for each boundary, and the two meetings at the start and the end of a step.
    samples: of each micro-batch. synchronised: what ``Pipeline.synchronised_bytes`` says of the weights that
    are shared, and of replicas.
    """
    payload: dict[str, int] = {}
    if schedule.world_size > 1:
        sent = 0
        for _, message, _ in messages(without_communication(schedule), rank):
            for shape in boundaries[message.boundary]:
                if message.kind == Kind.FORWARD or shape.has_gradient:
                    sent += shape.size(samples[message.microbatch])
            if is_first_step and message.kind == Kind.FORWARD and message.microbatch == 0:
                sent += HEADER_BYTES
        numbers = (1 + 2 * schedule.microbatches) + (1 + schedule.microbatches)
        payload = {"send": sent + numbers * 8 * (schedule.world_size - 1)}
    for operation, size in (synchronised or {}).items():
        payload[operation] = payload.get(operation, 0) + size
    return {operation: size for operation, size in payload.items() if size}
