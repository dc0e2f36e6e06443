"""``DataParallel``: replicas of a module in one process, a thread for each, a slice of the batch for each.

The oldest way, shown because of what is wrong with it; ``DistributedDataParallel`` is what to use.

- One process has one interpreter lock. Replicas run at the same time only while they are inside operators;
  all Python of all replicas stands in one queue, so that n replicas of a module of small operators take as
  long as one after the other.
- The module is copied to each further replica at every forward, and their gradients are added into the
  first's at every backward: (n - 1) times the parameters each way at each step, where an all-reduce has one
  call that overlaps with backward. On a CPU the copies stand in the same memory that the first replica
  already had.
- The first device holds the whole batch, all outputs, all gradients and the optimizer's state; it is full
  first.
- Changes that a forward makes to the module are lost, except to buffers of the first replica in place.

Everything is done by hand: ``scatter`` the inputs, ``replicate`` the module, ``parallel_apply`` and
``gather``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from kernels.cores import affinity
from parallel.buckets import bytes_of
from parallel.memory_held import Memory

Device: TypeAlias = int | str | torch.device


def scatter(value: Any, devices: Sequence[torch.device], dim: int = 0) -> list[Any]:
    """The value for each replica: tensors in equal slices along ``dim`` (the last may be smaller, there may
    be fewer slices than devices), tuples, lists and dicts element by element, anything else shared."""
    if isinstance(value, torch.Tensor):
        if not value.dim():
            raise ValueError("a tensor of no dimensions has no batch to scatter; pass a Python number")
        return [c.to(d) for c, d in zip(value.chunk(len(devices), dim), devices, strict=False)]
    if isinstance(value, dict):
        parts = [scatter(item, devices, dim) for item in value.values()]
        return [dict(zip(value, items, strict=True)) for items in zip(*parts, strict=False)] or [{}] * len(
            devices
        )
    if isinstance(value, list | tuple):
        parts = [scatter(item, devices, dim) for item in value]
        make: Callable[[Any], Any] = (
            (lambda items: type(value)(*items)) if hasattr(value, "_fields") else type(value)
        )
        return [make(items) for items in zip(*parts, strict=False)] or [value] * len(devices)
    return [value] * len(devices)


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """One output of the replicas' on ``device``: tensors joined along ``dim``, those without dimensions as a
    vector."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        there = [output.to(device) for output in outputs]
        return torch.cat(there, dim) if first.dim() else torch.stack(there)
    if first is None:
        return None
    if isinstance(first, dict):
        return type(first)({name: gather([o[name] for o in outputs], device, dim) for name in first})
    if isinstance(first, list | tuple):
        items = [gather(one, device, dim) for one in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    raise TypeError(
        f"replicas returned {type(first).__name__}; gather takes tensors, dicts, lists, tuples and None"
    )


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """The module and copies of it, one for each device, whose gradients flow back into the module's
    parameters.

    The first shares the module's memory. The copies' parameters are plain tensors that autograd knows as
    copies: backward adds the gradients of all replicas into the one parameter (a reduce to the first device).
    """
    tensors = [*module.parameters(), *module.buffers()]
    replicas = []
    for number, device in enumerate(devices):
        mine = {t: t if number == 0 else t.to(device, copy=True) for t in tensors}
        copies = {child: child._replicate_for_data_parallel() for child in module.modules()}
        for child, replica in copies.items():
            for name, grandchild in child._modules.items():
                replica._modules[name] = None if grandchild is None else copies[grandchild]
            for name, param in child._parameters.items():
                setattr(replica, name, None if param is None else mine[param])
            for name, buffer in child._buffers.items():
                replica._buffers[name] = None if buffer is None else mine[buffer]
        replicas.append(copies[module])
    return replicas


def parallel_apply(replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Sequence[Any]) -> list[Any]:
    """The replicas' outputs, each computed in a thread of its own. What a replica raises, raises here, with
    its number."""
    results: list[Any] = [None] * len(replicas)
    errors: dict[int, Exception] = {}
    gradients = torch.is_grad_enabled()
    kind = inputs_device(inputs[0], kwargs[0]).type
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(number: int) -> None:
        try:
            with torch.set_grad_enabled(gradients), torch.autocast(kind, dtype, enabled=autocast):
                results[number] = replicas[number](*inputs[number], **kwargs[number])
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, len(replicas))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    for number, error in sorted(errors.items()):
        error.add_note(f"in replica {number} of {len(replicas)}")
        raise error
    return results


def inputs_device(inputs: Any, kwargs: Any) -> torch.device:
    """The device of the first tensor among a replica's inputs; the CPU where there is none."""
    leaves = torch.utils._pytree.tree_leaves((inputs, kwargs))
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))


class DataParallel(nn.Module):
    """``torch.nn.DataParallel``, on CPUs too: the batch in slices, a replica and a thread for each, outputs
    joined.

    module: with all parameters and buffers on ``device_ids[0]``.
    device_ids: the replicas' devices, the same one several times if you like (["cpu", "cpu"]); None is every
        accelerator there is, without one a CPU replica for each core of this process.
    output_device: of the joined output; the first by default. dim: of the batch.

    ValueError: no device; a module elsewhere. A batch that is smaller than the number of replicas leaves some
        out.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[Device] | None = None,
        output_device: Device | None = None,
        dim: int = 0,
    ) -> None:
        super().__init__()
        self.module, self.dim = module, dim
        if device_ids is None:
            number = torch.cuda.device_count()
            device_ids = list(range(number)) or ["cpu"] * len(affinity())
        if not device_ids:
            raise ValueError("device_ids is empty; name a device for each replica")
        self.devices = [_device(device) for device in device_ids]
        self.output_device = _device(device_ids[0] if output_device is None else output_device)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's output for the whole batch."""
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if tensor.device != self.devices[0]:
                raise ValueError(
                    f"{name} is on {tensor.device}; the module must be on {self.devices[0]}, the first"
                )
        scattered = scatter((inputs, kwargs), self.devices, self.dim)
        if len(scattered) == 1:
            return self.module(*scattered[0][0], **scattered[0][1])
        replicas = replicate(self.module, self.devices[: len(scattered)])
        outputs = parallel_apply(replicas, [one for one, _ in scattered], [other for _, other in scattered])
        return gather(outputs, self.output_device, self.dim)


def _device(device: Device) -> torch.device:
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def predict_communication(module: nn.Module, replicas: int) -> dict[str, int]:
    """Bytes copied at each step for the replicas' sake, inputs and outputs apart.

    broadcast: parameters and buffers to every replica but the first; reduce: their gradients back.
    """
    parameters = sum(map(bytes_of, module.parameters()))
    trainable = sum(bytes_of(param) for param in module.parameters() if param.requires_grad)
    buffers = sum(map(bytes_of, module.buffers()))
    return {"broadcast": (replicas - 1) * (parameters + buffers), "reduce": (replicas - 1) * trainable}


def predict_memory(module: nn.Module, replicas: int) -> Memory:
    """Bytes held by the one process between forward and the end of backward, activations and state apart.

    ``buffers``: the module's, and the copies of all that the further replicas hold until backward is through.
    """
    parameters = sum(map(bytes_of, module.parameters()))
    trainable = sum(bytes_of(param) for param in module.parameters() if param.requires_grad)
    buffers = sum(map(bytes_of, module.buffers()))
    return Memory(parameters, trainable, 0, buffers + (replicas - 1) * (parameters + buffers))
