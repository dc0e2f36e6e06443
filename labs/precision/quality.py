"""Bits per byte on files that the training has not seen, of a model in whatever form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from labs.models.text import standard_library

BATCH = 16  # windows of one pass
Logits = Callable[[torch.Tensor], torch.Tensor]


def held_out(windows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) int64 (windows, length): evenly spread over the validation files, the same at each
    call.

    ValueError: more windows than the files hold without overlap.
    """
    text = standard_library().validation
    most = (len(text) - 1) // length
    if windows > most:
        raise ValueError(f"the validation files hold {most} windows of {length} bytes, not {windows}")
    starts = torch.arange(windows) * ((len(text) - length - 1) // windows)
    places = starts[:, None] + torch.arange(length + 1)
    chosen = text[places].long()
    return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()


@torch.no_grad()
def bits_per_byte(logits: Logits, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each window, float64 (windows,): mean of -log2 p(next byte). A byte is a token here."""
    found = []
    for some, wanted in zip(tokens.split(BATCH), targets.split(BATCH), strict=True):
        nats = F.cross_entropy(logits(some).double().transpose(1, 2), wanted, reduction="none")
        found.append(nats.mean(1) / math.log(2))
    return torch.cat(found)
