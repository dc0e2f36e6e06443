"""Fully sharded data parallelism: ZeRO stage 3 with the signature and semantics of PyTorch's FSDP2.

Sources: Rajbhandari et al. 2020 "ZeRO" (section 5.3: stage 3); Zhao et al. 2023 "PyTorch FSDP: Experiences on
Scaling Fully Sharded Data Parallel"; torch.distributed.fsdp.fully_shard.

Every rank keeps 1 / W of each parameter, of its gradient and of what the optimizer holds for it. Of whole
parameters there are those of the module that runs and of the one that follows:

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = AdamW(model.parameters())        # steps on the shards
    model(inputs).backward(); optimizer.step()

For a group of P bytes of parameters on W ranks a step costs two all-gathers (one with
reshard_after_forward=False) and a reduction, each of P bytes: one and a half times (as much as) data
parallelism's all-reduce. ``predict_communication`` and ``predict_memory`` say it to the byte.

``fsdp_layout.py`` says what lies where, ``fsdp_group.py`` is a group and its collectives, ``fsdp_runtime.py``
when they run, ``fsdp_state.py`` whole state dicts, ``fsdp_clip.py`` the norm of the gradients,
``fsdp_prediction.py`` the predictions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.fsdp_clip import clip_grad_norm_
from parallel.fsdp_group import Group
from parallel.fsdp_layout import CPUOffloadPolicy, Mesh, MixedPrecisionPolicy, by_dtype, places_of
from parallel.fsdp_prediction import predict_communication, predict_memory
from parallel.fsdp_runtime import Unit, unit_of, units_of
from parallel.fsdp_state import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
)
from parallel.same_module import check_alike, described

__all__ = [
    "CPUOffloadPolicy",
    "MixedPrecisionPolicy",
    "clip_grad_norm_",
    "full_optimizer_state_dict",
    "full_state_dict",
    "fully_shard",
    "load_full_optimizer_state_dict",
    "load_full_state_dict",
    "predict_communication",
    "predict_memory",
    "set_prefetch",
    "set_requires_gradient_sync",
]


def fully_shard(
    module: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    reshard_after_forward: bool = True,
    mp_policy: Any = None,
    offload_policy: Any = None,
) -> nn.Module:
    """Shard the parameters of ``module`` that no earlier call has sharded; they form one communication group.

    Called on submodules first, on the root last, by all ranks alike. Returns ``module``, whose parameters are
    from now on this rank's shards (rows of the first dimension) except within forward and backward; make the
    optimizer afterwards. Values are those of the group's first rank.

    mesh: 1-D, the ranks that split the parameters; 2-D (replicate, shard), HSDP: split over the second
        dimension, the same over the first; or a process group; None: the default group. Parameters that are
        local shards of tensor parallelism already are split further over the mesh's data dimension.
    reshard_after_forward: free the whole parameters after forward and gather them again for backward.
    mp_policy: ``MixedPrecisionPolicy``. offload_policy: ``CPUOffloadPolicy``. torch's serve as well.

    The root's forward has to run, not only a submodule's, for submodules to know of one another. Activation
    checkpointing: ``use_reentrant=False``.

    ValueError: ranks differ in names, shapes, dtypes or frozen parameters; a parameter is tied to one of
    another group; a mesh of other dimensions; a module that was sharded already.
    """
    if unit_of(module) is not None:
        raise ValueError(f"fully_shard was applied to this {type(module).__name__} already")
    if not isinstance(reshard_after_forward, bool):
        raise ValueError(f"reshard_after_forward is True or False, not {reshard_after_forward!r}")
    policy = mp_policy or MixedPrecisionPolicy()
    offload = offload_policy if hasattr(offload_policy, "pin_memory") else None
    places = places_of(module)
    where = _mesh(mesh, next(iter(places), None))
    names = {parameter: name for name, parameter in module.named_parameters()}
    facts = described((names[parameter], parameter) for parameter in places)
    for group in where.shard, where.replicate:
        if group is not None:
            check_alike(f"parameters of {type(module).__name__}", facts, group)
    groups = [Group(originals, where, policy, offload) for originals in by_dtype(places)]
    for original in places:
        original.fsdp_sharded = True
    unit = Unit(module, groups, reshard_after_forward, policy)
    vars(module)["fsdp_unit"] = unit
    return module


def _mesh(mesh: DeviceMesh | dist.ProcessGroup | None, parameter: nn.Parameter | None) -> Mesh:
    """The groups of ``mesh``, and the device on which to gather: the mesh's, else the parameters'."""
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2:
            raise ValueError(
                f"a mesh of 1 dimension (shard) or 2 (replicate, shard) is wanted, not {mesh.ndim}"
            )
        kind = mesh.device_type
        shard, replicate = mesh.get_group(mesh.ndim - 1), mesh.get_group(0) if mesh.ndim == 2 else None
    else:
        if not dist.is_initialized():
            raise ValueError("fully_shard needs a process group: call torch.distributed.init_process_group")
        shard, replicate = mesh or dist.group.WORLD, None
        kind = "cpu" if parameter is None else parameter.device.type
        if dist.get_backend(shard) == "nccl":
            kind = "cuda"
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return Mesh(shard, replicate, device)


def set_requires_gradient_sync(module: nn.Module, requires_gradient_sync: bool) -> None:
    """False: backward leaves gradients whole and unreduced on every rank, until a backward with True adds its
    own and reduces the sum: accumulation over micro-batches for one reduction."""
    for unit in units_of(module):
        unit.synchronizes = requires_gradient_sync


def set_prefetch(module: nn.Module, prefetch: bool) -> None:
    """False: a module's parameters are gathered when it runs, and waited for at once (default: one ahead)."""
    for unit in units_of(module):
        unit.prefetches = prefetch
