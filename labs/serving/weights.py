"""The model that the lab serves: a GPT over bytes, the same weights in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs.models.gpt import GPT

HEAD = 64  # numbers of an attention head
VOCABULARY = 256  # the bytes
STRENGTH = 2.0
"""Weights of the matrices are drawn so much wider than for training: attention and feed-forward then decide
the next byte. At the usual width a random model repeats its last byte, and any cache would do."""


def kv_bytes_per_token(width: int, layers: int) -> int:
    """Keys and values of a token in all layers, float32."""
    return layers * 2 * width * 4


def serving_model(width: int, layers: int, context: int, seed: int = 0) -> GPT:
    """Llama-like (rotary, RMSNorm, SwiGLU), head not tied, float32, random from ``seed``."""
    import torch

    from labs.models.configuration import GPTConfig
    from labs.models.gpt import GPT

    config = GPTConfig(
        width=width,
        layers=layers,
        heads=width // HEAD,
        context=context,
        positions="rotary",
        norm="rms",
        activation="swiglu",
        bias=False,
        tied=False,
        vocabulary=VOCABULARY,
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(STRENGTH)
        model.head.weight.mul_(5.0)  # logits as far apart as a trained model's
    return model.requires_grad_(False).eval()
