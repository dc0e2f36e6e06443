"""Which experts a token goes to, what capacity refuses, and how unevenly the experts are used.

Sources: Shazeer et al. 2017 "Outrageously Large Neural Networks", section 2.1 (top-k softmax gates) and
equations 6 and 7 (importance); Fedus et al. 2021 "Switch Transformers", section 2.2: equation 3 (capacity),
equations 4 to 6 (the loss that balances load).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.tensor_regions import Group, fresh, start_all_reduce


@dataclass(frozen=True)
class Routing:
    """Of one rank's tokens. A pair is a (token, choice), numbered token * top_k + choice.

    probabilities: (tokens, experts), the router's softmax. gates: (tokens, top_k), their weights in the sum.
    chosen: (tokens, top_k) expert of each pair. order: pairs that were kept, by expert, within an expert as
    they were admitted. wanted, kept: (experts,) pairs that chose each expert, and that it took.
    """

    probabilities: torch.Tensor
    gates: torch.Tensor
    chosen: torch.Tensor
    order: torch.Tensor
    wanted: torch.Tensor
    kept: torch.Tensor

    @property
    def dropped(self) -> int:
        """Pairs that no expert took."""
        return int((self.wanted - self.kept).sum())


def capacity(tokens: int, experts: int, top_k: int, capacity_factor: float) -> int:
    """Pairs that an expert takes of one rank's: the even share times the factor (Fedus et al., eq. 3)."""
    return math.ceil(capacity_factor * tokens * top_k / experts)


def route(
    logits: torch.Tensor, top_k: int, capacity_factor: float | None = None, normalize: bool = True
) -> Routing:
    """The top_k experts of each token. logits: (tokens, experts); the softmax is float32 for 16-bit logits.

    capacity_factor: an expert refuses pairs beyond ``capacity`` of this rank's tokens: all first choices are
    admitted before any second, and earlier tokens before later ones. None: it takes all. normalize: the
    gates of a token sum to 1 (with top_k = 1 they would all be 1, and are the probability instead).
    Equal logits go to the expert of the lowest number.
    """
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.softmax(-1, dtype=wide)
    chosen = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = probabilities.gather(-1, chosen)
    if normalize and top_k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    # First choices of all tokens, then second ones; sorting is stable, so an expert admits in this order.
    by_choice = chosen.T.reshape(-1)
    order = by_choice.argsort(stable=True)
    wanted = torch.bincount(by_choice, minlength=experts)
    kept = wanted
    if capacity_factor is not None:
        kept = wanted.clamp(max=capacity(tokens, experts, top_k, capacity_factor))
        first = wanted.cumsum(0) - wanted
        place = torch.arange(len(order), device=order.device) - first[by_choice[order]]
        order = order[place < kept[by_choice[order]]]
    pairs = order % max(1, tokens) * top_k + order // max(1, tokens)
    return Routing(probabilities, gates, chosen, pairs, wanted, kept)


def load_balancing_loss(
    probabilities: torch.Tensor, wanted: torch.Tensor, tokens: int, world_size: int = 1
) -> torch.Tensor:
    """experts * sum_i f_i P_i (Fedus et al., equations 4 to 6): 1 when load is even, at most experts.

    f_i: fraction of all ranks' pairs that chose expert i, from ``wanted`` (experts,) summed over ranks; no
    gradient. P_i: mean probability of expert i over all tokens, of which this rank knows its own
    (``probabilities``). What is returned is this rank's part, of which the mean over ranks is the loss over
    all ``tokens``, whatever number each has: average it, and its gradient, as the rest of a data-parallel
    loss.
    """
    experts = probabilities.shape[-1]
    share = wanted.to(probabilities.dtype) / max(1, int(wanted.sum()))
    return experts * world_size * (share * probabilities.sum(0)).sum() / max(1, tokens)


def importance_loss(
    gates: torch.Tensor, chosen: torch.Tensor, experts: int, group: Group = None
) -> torch.Tensor:
    """Square of the coefficient of variation of the experts' importance (Shazeer et al., equations 6 and 7).

    An expert's importance is the sum of its gates over the tokens of all ranks (one all-reduce of ``experts``
    numbers forward, none backward); the loss is the same on every rank, its gradient is of this rank's gates,
    times the number of ranks, so that it may be averaged as the rest of a data-parallel loss.
    """
    importance = gates.new_zeros(experts).index_add(0, chosen.reshape(-1), gates.reshape(-1))
    importance = _Total.apply(importance, group)
    return importance.var(correction=0) / importance.mean().square()


class _Total(torch.autograd.Function):
    """The sum over ranks, on which a loss of every rank depends: its gradient sums theirs, all equal."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.world = dist.get_world_size(group)
        return start_all_reduce(fresh(input), group)()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.world, None
