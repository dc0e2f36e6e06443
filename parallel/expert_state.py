"""Gradients and state of a model with expert-parallel layers: what every rank has, and what one has."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from parallel.expert import MixtureOfExperts
from parallel.tensor_regions import Group


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


def predict_communication(module: nn.Module, group: Group = None) -> dict[str, int]:
    """Bytes of one ``average_gradients``: the gradients of all trained parameters but the experts'."""
    own = _expert_parameters(module)
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    moved = sum(parameter.nbytes for parameter in trained)
    return {"all_reduce": moved} if moved and dist.get_world_size(group) > 1 else {}
