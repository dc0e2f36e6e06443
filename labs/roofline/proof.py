"""Proof that each timed step computed what it should: the same operation in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

from labs.lab import Check
from labs.roofline.config import Config
from labs.roofline.operations import make_inputs, operations

CHECKED_ROWS = 512  # at most, spread over the output: a reference of all rows would take longer than the lab
CONVOLUTION_TF32 = 2.0**-10  # cuDNN convolves float32 in TF32 by default: 10 bits


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest error of each output, relative to what the operation gives for the inputs' magnitudes.

    Tolerance: one rounding to the output's dtype and the rounding of a tree sum of ``terms`` in float32,
    four times over. Of outputs with rows, at most ``CHECKED_ROWS`` are held against the reference.
    """
    import torch

    found = []
    by_address = {op.address(device): (op, device) for op in operations(config) for device in op.devices}
    for address, output in outputs.items():
        operation, device = by_address[address]
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"{address} returned {type(output).__name__} where a torch.Tensor is needed")
        got, inputs = output.detach(), make_inputs(torch, operation)
        if operation.sliced and got.dim() > 1:
            step = -(-got.shape[0] // CHECKED_ROWS)
            got = got[::step]
            inputs = tuple(
                tensor[::step] if place < operation.sliced else tensor for place, tensor in enumerate(inputs)
            )
        wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
        function = operation.function(torch)
        reference = function(*wide)
        scale = function(*(tensor.abs() for tensor in wide)).abs().max().clamp(min=1e-300)
        error = math.nan
        if got.shape == reference.shape:
            error = float((got.cpu().double() - reference).abs().max() / scale)
        single = torch.finfo(torch.float32).eps
        tolerance = torch.finfo(getattr(torch, operation.dtype)).eps
        tolerance += 4 * single * (1 + math.log2(operation.terms))
        if device == "cuda" and operation.group == "conv2d":
            tolerance += CONVOLUTION_TF32
        found.append(Check(address, error, tolerance, "the same operation in float64"))
    return found
