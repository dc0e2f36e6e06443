"""Expert parallelism: a mixture of experts that lie on different ranks, tokens sent to them and back.

Sources: Shazeer et al. 2017 "Outrageously Large Neural Networks", section 3.1 (experts split, data
replicated: each rank's tokens go to all ranks' experts); Lepikhin et al. 2020 "GShard", section 3.2 (dispatch
and combine by all-to-all); Gale et al. 2022 "MegaBlocks" (experts take groups of different sizes, nothing is
padded).

    y_t = sum over the k chosen experts of gate_te * expert_e(x_t)

``DenseMixtureOfExperts`` is that, one expert after the other. ``MixtureOfExperts`` sorts its (token, choice)
pairs by expert, an all-to-all scatters them, each expert runs once on all that came, a second all-to-all
gathers them back. Every sum has a fixed order (choices of a token one after the other), so that a run can be
repeated bit for bit.

Ranks see different tokens, as in data parallelism, and a gradient is averaged over ranks:
``average_gradients``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from kernels.op import FLOATS_AND_DOUBLE
from parallel.agreement import exchange
from parallel.partition import split
from parallel.routing import Routing, load_balancing_loss, route
from parallel.tensor_regions import Group


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
        _check_settings(count, top_k, capacity_factor)
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
        groups = _Pairs.apply(tokens, routing.order, self.top_k).split(list(self.load.kept))
        outputs = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        return combine(outputs, routing).view_as(input)


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
        _check_settings(count, top_k, capacity_factor)
        self.partition = split(count, self.world)
        ((first, stop),) = self.partition.ranges[self.rank]
        if len(experts) != stop - first:
            raise ValueError(
                f"rank {self.rank} holds experts {first} to {stop - 1}; it was given {len(experts)}"
            )
        self.router = router
        self.experts = nn.ModuleDict({str(first + place): expert for place, expert in enumerate(experts)})
        self.top_k, self.capacity_factor, self.normalize = top_k, capacity_factor, normalize
        self.auxiliary_loss: torch.Tensor | None = None
        self.load: Load | None = None
        self.kept: list[list[int]] = []
        """[rank][expert] pairs sent in the last forward."""

    @classmethod
    def from_dense(cls, dense: DenseMixtureOfExperts, group: Group = None) -> Self:
        """This rank's experts of a whole mixture, the same on every rank; modules are taken, not copied."""
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
        pairs = _Pairs.apply(tokens, routing.order, self.top_k)
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


def _check_settings(experts: int, top_k: int, capacity_factor: float | None) -> None:
    if not 1 <= top_k <= experts or (capacity_factor is not None and capacity_factor <= 0):
        raise ValueError(
            f"top_k={top_k} is from 1 to {experts} experts; capacity_factor={capacity_factor} is above 0 or None"
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


class _Pairs(torch.autograd.Function):
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


def average_gradients(module: nn.Module, group: Group = None) -> None:
    """After backward: every parameter's gradient becomes that of the mean over ranks of their losses.

    Parameters that every rank has are averaged, in one all-reduce a dtype. An expert has its gradient from
    all ranks' tokens already, as a sum, which is divided. A trained parameter without a gradient counts as
    zeros.
    """
    world = dist.get_world_size(group)
    own = _expert_parameters(module)
    shared: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if id(parameter) in own:
            parameter.grad.div_(world)
        else:
            shared.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in shared.values() if world > 1 else ():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        flat.div_(world)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _expert_parameters(module: nn.Module) -> set[int]:
    layers = [layer for layer in module.modules() if isinstance(layer, MixtureOfExperts)]
    return {id(parameter) for layer in layers for parameter in layer.experts.parameters()}


def full_state_dict(module: nn.Module, group: Group = None) -> dict[str, torch.Tensor]:
    """The state dict of the same module with every expert in it, on every rank.

    Experts are broadcast by the ranks that have them; they are alike in structure.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for path, layer in module.named_modules():
        if not isinstance(layer, MixtureOfExperts):
            continue
        prefix = f"{path}.experts." if path else "experts."
        template = next(iter(layer.experts.values())).state_dict()
        for rank, ((first, stop),) in enumerate(layer.partition.ranges):
            for expert in range(first, stop):
                for key, like in template.items():
                    name = f"{prefix}{expert}.{key}"
                    tensor = state[name].clone() if name in state else torch.empty_like(like)
                    dist.broadcast(tensor, ranks[rank], group=group)
                    state[name] = tensor
    return state


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


def predict_gradient_communication(module: nn.Module, group: Group = None) -> dict[str, int]:
    """Bytes of one ``average_gradients``: the gradients of all trained parameters but the experts'."""
    own = _expert_parameters(module)
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    moved = sum(parameter.nbytes for parameter in trained)
    return {"all_reduce": moved} if moved and dist.get_world_size(group) > 1 else {}
