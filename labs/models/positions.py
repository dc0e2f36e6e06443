"""Where a token stands: rotations of queries and keys, or sinusoids added to embeddings.

Sources: Su et al. 2021, "RoFormer", section 3.2 (rotary); Vaswani et al. 2017, section 3.5 (sinusoids); Llama
3.1's ``rope_scaling`` as published with its weights.
"""

from __future__ import annotations

import math

import torch

from labs.models.configuration import BlockConfig

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each (length, head_dim / 2)."""


def rotary_frequencies(config: BlockConfig, device: torch.device | None = None) -> torch.Tensor:
    """Radians that each pair of coordinates turns from one position to the next: (head_dim / 2,), float64.

    base^(-2 j / head_dim) for pair j; of a model with an extended context: scaled, see RotaryScaling.
    """
    size = config.size_of_head
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
    frequencies = config.rotary_base**-exponents
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.original_context == 0:
        return frequencies / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * frequencies / (2 * math.pi)  # within the context of the pre-training
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotation(config: BlockConfig, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin of the angle of each position (length,) and pair, (length, head_dim / 2) each.

    Computed in float64, returned in float32 or, for a float64 model, in float64: a bfloat16 table would turn
    late positions by a wrong angle. There is no buffer that ``model.to(torch.bfloat16)`` could round.
    """
    angles = positions.double()[:, None] * rotary_frequencies(config, positions.device)
    wanted = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wanted), angles.sin().to(wanted)


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (j, j + dim / 2) of x's coordinates turned by the angle of its position; x's shape and dtype.

    x: (..., length, dim). The pairing is GPT-NeoX's and that of Llama's checkpoints on Hugging Face.
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def sinusoids(positions: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """sin and cos of position / 10000^(2 j / width), interleaved: (length, width)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.double()[:, None] * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(dtype)
