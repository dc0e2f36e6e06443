"""Expert parallelism: a mixture of experts that lie on different ranks, tokens sent to them and back.

Sources: Shazeer et al. 2017 "Outrageously Large Neural Networks", section 3.1 (experts split, the rest
replicated: each rank's tokens go to all ranks' experts); Lepikhin et al. 2020 "GShard", section 3.2 (dispatch
and combine by all-to-all); Gale et al. 2022 "MegaBlocks" (experts take groups of different sizes, nothing is
padded).

``parallel.mixture`` is the plain form. Here the (token, choice) pairs are sorted by expert, an all-to-all
scatters them, each expert runs once on all that came, and a second all-to-all gathers them back. Every sum
has a fixed order (choices of a token one after the other), so that a run can be repeated bit for bit.

Ranks see different tokens, as in data parallelism, and a gradient is averaged over ranks:
``parallel.expert_state.average_gradients``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from kernels.op import FLOATS_AND_DOUBLE
from parallel.agreement import exchange
from parallel.mixture import DenseMixtureOfExperts, Load, Pairs, check_settings, combine, route_tokens
from parallel.partition import split
from parallel.routing import Routing, load_balancing_loss
from parallel.same_module import synchronise_module
from parallel.sharded import of_one_rank
from parallel.tensor_regions import Group


class MixtureOfExperts(nn.Module):
    """This rank's experts of a mixture that is split over the group, and a router that every rank has.

    The first ranks have one expert more where their number does not divide. An expert is named by its number
    in the whole, as in ``DenseMixtureOfExperts``. Each rank brings its own tokens, any number of them, and
    capacity is of its tokens. ``auxiliary_loss`` is this rank's part, to be averaged over ranks; ``load`` is
    of all ranks.

    ValueError: fewer experts than ranks. On every rank: widths, dtypes or settings that differ between ranks.
    """

    def __init__(
        self,
        router: nn.Linear,
        experts: Sequence[nn.Module],
        top_k: int = 2,
        capacity_factor: float | None = None,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        count = router.out_features
        if count < self.world:
            raise ValueError(
                f"{count} experts are fewer than the {self.world} ranks; each needs at least one"
            )
        check_settings(count, top_k, capacity_factor)
        self.partition = split(count, self.world)
        ((first, stop),) = self.partition.ranges[self.rank]
        if len(experts) != stop - first:
            raise ValueError(
                f"rank {self.rank} holds experts {first} to {stop - 1}; it was given {len(experts)}"
            )
        self.router = router
        self.experts = nn.ModuleDict({str(first + place): expert for place, expert in enumerate(experts)})
        for parameter in self.experts.parameters():
            of_one_rank(parameter, self.world)
        self.top_k, self.capacity_factor, self.normalize = top_k, capacity_factor, normalize
        self.auxiliary_loss: torch.Tensor | None = None
        self.load: Load | None = None
        self.kept: list[list[int]] = []
        """[rank][expert] pairs sent in the last forward."""

    @classmethod
    def from_dense(cls, dense: DenseMixtureOfExperts, group: Group = None) -> Self:
        """This rank's experts of a whole mixture, as the first rank has it; modules are taken, not copied."""
        synchronise_module(dense, group)
        pieces = split(len(dense.experts), dist.get_world_size(group)).ranges
        ((first, stop),) = pieces[dist.get_rank(group)]
        return cls(
            dense.router,
            list(dense.experts)[first:stop],
            dense.top_k,
            dense.capacity_factor,
            dense.normalize,
            group,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        tokens = input.reshape(-1, input.shape[-1])
        routing = route_tokens(self.router, tokens, self.top_k, self.capacity_factor, self.normalize)
        self._exchange(tokens, routing)
        assert self.load is not None
        wanted = torch.tensor(self.load.wanted, device=tokens.device)
        self.auxiliary_loss = load_balancing_loss(routing.probabilities, wanted, self.load.tokens, self.world)
        # Pairs lie by expert, and so by rank.
        sent = [sum(self.kept[self.rank][slice(*piece)]) for ((piece),) in self.partition.ranges]
        own = slice(*self.partition.ranges[self.rank][0])
        arriving = [row[own] for row in self.kept]  # [rank][own expert]
        received = [sum(row) for row in arriving]
        pairs = Pairs.apply(tokens, routing.order, self.top_k)
        arrived = _AllToAll.apply(pairs, sent, received, self.group)
        by_expert = _by_expert(arriving, tokens.device)
        counts = [sum(column) for column in zip(*arriving, strict=True)]
        groups = arrived[by_expert].split(counts)
        outputs = torch.cat([expert(g) for expert, g in zip(self.experts.values(), groups, strict=True)])
        returned = _AllToAll.apply(outputs[by_expert.argsort()], received, sent, self.group)
        return combine(returned, routing).view_as(input)

    def _exchange(self, tokens: torch.Tensor, routing: Routing) -> None:
        """Tell every rank how many pairs go where; check that the ranks agree on what a token is."""
        code = FLOATS_AND_DOUBLE.index(tokens.dtype) if tokens.dtype in FLOATS_AND_DOUBLE else -1
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.experts.parameters())
        settings = [tokens.shape[1], code, len(routing.wanted), self.top_k, tokens.requires_grad, learns]
        counts = torch.cat([routing.wanted, routing.kept]).tolist()
        rows = exchange([*settings, len(tokens), *counts], tokens.device, self.group)
        width = len(settings)
        if any(row[:width] != rows[0][:width] for row in rows):
            raise ValueError(
                "the ranks of a mixture of experts must agree on (width, dtype, experts, top_k, whether the "
                "input takes a gradient, whether the experts do); "
                + "; ".join(f"rank {rank} has {tuple(row[:width])}" for rank, row in enumerate(rows))
            )
        experts = self.router.out_features
        self.kept = [row[-experts:] for row in rows]
        wanted = [row[-2 * experts : -experts] for row in rows]
        self.load = Load(
            sum(row[width] for row in rows),
            tuple(map(sum, zip(*wanted, strict=True))),
            tuple(map(sum, zip(*self.kept, strict=True))),
        )


class _AllToAll(torch.autograd.Function):
    """Rows: the first ``sent[0]`` to rank 0, and so on; ``received[i]`` rows come from rank i, in order."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Group
    ) -> torch.Tensor:
        ctx.way = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _all_to_all(grad, received, sent, group), None, None, None


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    if dist.get_world_size(group) == 1:
        return rows.clone()
    arrived = rows.new_empty(sum(received), rows.shape[-1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _by_expert(arriving: list[list[int]], device: torch.device) -> torch.Tensor:
    """Rows that lie by rank and then by expert, as places by expert and then by rank."""
    counts = torch.tensor(arriving, device=device)
    experts = torch.arange(counts.shape[1], device=device).repeat(counts.shape[0])
    return experts.repeat_interleave(counts.flatten()).argsort(stable=True)


def predict_communication(
    kept: Sequence[Sequence[int]],
    width: int,
    itemsize: int,
    rank: int,
    input_gradient: bool = True,
    backward: bool = True,
) -> dict[str, int]:
    """Bytes of one forward and backward of a ``MixtureOfExperts`` on ``rank``.

    kept: [rank][expert] pairs that each rank sends to each expert, ``MixtureOfExperts.kept``; with even load
    and nothing dropped each is tokens * top_k / experts. Tokens are ``width`` elements of ``itemsize`` bytes.
    There is an all-to-all each way, and both again backward (only the one on the way back if the input takes
    no gradient); and the all-gather of the counts before.
    """
    world, experts = len(kept), len(kept[0])
    if world == 1:
        return {}
    ((first, stop),) = split(experts, world).ranges[rank]
    rows = max(sum(kept[rank]), sum(sum(row[first:stop]) for row in kept))
    calls = 2 + backward * (1 + input_gradient)
    return {"all_to_all": calls * rows * width * itemsize, "all_gather": world * (7 + 2 * experts) * 8}
