"""A mixture of experts in one process: each token goes to its top-k experts, one expert after the other.

Source: Shazeer et al. 2017 "Outrageously Large Neural Networks", section 2:

    y_t = sum over the k chosen experts of gate_te * expert_e(x_t)

The plain form of ``parallel.expert``, which has its pieces from here: tokens to pairs, pairs to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from parallel.routing import Routing, load_balancing_loss, route


@dataclass(frozen=True)
class Load:
    """Of one forward over all ranks: tokens, and by expert the pairs that chose it and that it took."""

    tokens: int
    wanted: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def dropped(self) -> int:
        """Pairs refused by experts at their capacity; the token goes on without that expert's part."""
        return sum(self.wanted) - sum(self.kept)


class DenseMixtureOfExperts(nn.Module):
    """All experts in one process, each on the tokens that chose it. (..., width) -> (..., width).

    router: a linear layer from width to one logit an expert. experts: alike in structure. top_k,
    capacity_factor, normalize: see ``parallel.routing.route``; logits and gates are float32 for 16-bit
    tokens.

    After a forward ``auxiliary_loss`` is the loss that balances load, to be added with a weight (Fedus et al.
    take 0.01), and ``load`` a ``Load``.
    """

    def __init__(
        self,
        router: nn.Linear,
        experts: Sequence[nn.Module],
        top_k: int = 2,
        capacity_factor: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        count = router.out_features
        check_settings(count, top_k, capacity_factor)
        if len(experts) != count:
            raise ValueError(f"the router knows {count} experts; there are {len(experts)}")
        self.router, self.experts = router, nn.ModuleList(experts)
        self.top_k, self.capacity_factor, self.normalize = top_k, capacity_factor, normalize
        self.auxiliary_loss: torch.Tensor | None = None
        self.load: Load | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        tokens = input.reshape(-1, input.shape[-1])
        routing = route_tokens(self.router, tokens, self.top_k, self.capacity_factor, self.normalize)
        self.auxiliary_loss = load_balancing_loss(routing.probabilities, routing.wanted, len(tokens))
        self.load = Load(len(tokens), tuple(routing.wanted.tolist()), tuple(routing.kept.tolist()))
        groups = Pairs.apply(tokens, routing.order, self.top_k).split(list(self.load.kept))
        outputs = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        return combine(outputs, routing).view_as(input)


def check_settings(experts: int, top_k: int, capacity_factor: float | None) -> None:
    if not 1 <= top_k <= experts or (capacity_factor is not None and capacity_factor <= 0):
        raise ValueError(
            f"top_k={top_k} is from 1 to {experts} experts; capacity_factor={capacity_factor} is above 0, or "
            "None"
        )


def route_tokens(
    router: nn.Linear, tokens: torch.Tensor, top_k: int, capacity_factor: float | None, normalize: bool
) -> Routing:
    """``route`` of the router's logits, which are float32 for 16-bit tokens (Fedus et al., section 2.4)."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    bias = None if router.bias is None else router.bias.to(wide)
    with torch.autocast(tokens.device.type, enabled=False):
        logits = F.linear(tokens.to(wide), router.weight.to(wide), bias)
    return route(logits, top_k, capacity_factor, normalize)


def combine(outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(kept pairs, width) -> (tokens, width): each token's choices, weighted by its gates, in their order."""
    count, top_k = routing.gates.shape
    placed = outputs.new_zeros(count * top_k, outputs.shape[-1]).index_copy(0, routing.order, outputs)
    weighted = placed.view(count, top_k, placed.shape[-1]) * routing.gates.unsqueeze(-1)
    return weighted.sum(1).to(outputs.dtype)


class Pairs(torch.autograd.Function):
    """The token of each pair. Backward adds a token's pairs in the order of its choices, not as they come."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.shape = len(tokens), top_k
        return tokens[order // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,), (count, top_k) = ctx.saved_tensors, ctx.shape
        placed = grad.new_zeros(count * top_k, grad.shape[-1])
        placed[order] = grad
        return placed.view(count, top_k, placed.shape[-1]).sum(1), None, None
