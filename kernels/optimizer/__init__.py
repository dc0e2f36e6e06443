"""Optimizers in one pass over memory: ``torch.optim``'s classes, arguments, errors and checkpoints.

``kernels.AdamW(model.parameters(), lr=1e-3)`` is a ``torch.optim.AdamW``: construction, parameter groups,
hooks, schedulers, ``state_dict`` and the making of state are torch's own code. Only the arithmetic of
``step`` is ours: one launch for all parameters of a dtype, each element of parameter, gradient and state read
once and written once. ``foreach`` and ``fused`` make no difference to it.

Where the kernels do not serve, torch's own update runs on that parameter group and a ``FallbackWarning`` says
so once: ``capturable`` and ``differentiable``, sparse or complex gradients where torch takes them, other
devices, tensor subclasses, and steps that a ``GradScaler`` has left to unscale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from kernels import op
from kernels.op import FLOATS_AND_DOUBLE
from kernels.optimizer import operations
from kernels.optimizer.lists import device_of, dtype_of, elements_of, layout_of

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "RMSprop"]

Group = dict[str, Any]
Lists = list[list[Any]]


class _OnePass(torch.optim.Optimizer):
    """``step`` of all six: gather each group's tensors as torch does, then update them in one pass."""

    _step_group: Callable[[Group], None]
    _measured_as: str
    """The name under which ``kernels/crossover.json`` has its update."""

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        closure: evaluates the model again and returns the loss, which is returned.
        """
        if torch.cuda.is_initialized() and "capturable" in self.defaults:
            new = getattr(self, "_accelerator_graph_capture_health_check", None)
            (new or self._cuda_graph_capture_health_check)()  # torch's name for it until lately
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _gather(self, group: Group, number: int) -> Lists:
        """torch's lists: parameters that have a gradient, the gradients, and states, made where new."""
        lists: Lists = [[] for _ in range(number)]
        self._init_group(group, *lists)
        return lists

    def _path(self, group: Group, lists: Lists, steps: list[Any]) -> str:
        """Which update is to run: "kernels", "torch" where ours cannot, which is said once, or "small" where
        torch's serves better."""
        name, compiling = type(self).__name__, torch.compiler.is_compiling()
        reason = _unsuitable(group, lists, steps)
        if any(value is not None for value in self._scaling().values()):
            reason = "gradients that are still scaled (GradScaler with fused=True)"
        if reason:
            if not compiling:
                op.warn_once(name, f"there are no kernels for {reason}")
            return "torch"
        if lists[0] and not compiling:
            least = op.crossover(self._measured_as, lists[0][0].device.type)
            if least and sum(map(elements_of, lists[0])) < least:
                return "small"
        return "kernels"

    def _scaling(self) -> dict[str, Any]:
        """What ``torch.amp.GradScaler`` leaves on an optimizer with fused=True."""
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}


def _unsuitable(group: Group, lists: Lists, steps: list[Any]) -> str:
    """Why torch's own update has to run; empty where ours can."""
    for option in ("capturable", "differentiable"):
        if group.get(option):
            return f"{option}=True"
    tensors = [*lists[0], *lists[1]]
    for kind in set(map(type, tensors)):
        if kind is not torch.Tensor and kind is not torch.nn.Parameter:
            return f"tensors of type {kind.__name__}"
    for layout in set(map(layout_of, tensors)):
        if layout is not torch.strided:
            return f"gradients of layout {layout}"
    for dtype in set(map(dtype_of, tensors)):
        if dtype not in FLOATS_AND_DOUBLE:
            return f"tensors of {str(dtype).removeprefix('torch.')}"
    devices = set(map(device_of, lists[0]))
    for device in devices:
        if device.type not in ("cpu", "cuda"):
            return f"tensors on device {device.type!r}"
        if device.type == "cuda" and op.gpu_lacks(device):
            return f"tensors on {device}: {op.gpu_lacks(device)}"
    for device in set(map(device_of, steps)):
        if device.type != "cpu" and {device} != devices:
            return f"steps that are counted on {device}, where the parameters are not"
    return ""


def _way(group: Group, path: str, steps: list[Any]) -> dict[str, Any]:
    """foreach and fused for torch's update: its fused loop on small tensors unless another was asked for."""
    way = {name: group[name] for name in ("foreach", "fused")}
    if path == "small" and way == {"foreach": None, "fused": None}:
        way["fused"] = all(step.dtype is torch.float32 for step in steps)
    return way


def _alike(lists: Lists) -> list[Lists]:
    """The lists, split so that in each every tensor has the same dtype and device."""
    params = lists[0]
    if not params:
        return []
    if len(set(map(device_of, params))) == 1 and all(len(set(map(dtype_of, ts))) <= 1 for ts in lists):
        return [lists]
    given = [tensors for tensors in lists if tensors]
    kinds = list(zip(map(device_of, params), *(map(dtype_of, tensors) for tensors in given), strict=True))
    return [
        _chosen(lists, [index for index, kind in enumerate(kinds) if kind == one])
        for one in dict.fromkeys(kinds)
    ]


def _chosen(lists: Lists, indices: list[int]) -> Lists:
    return [[tensors[index] for index in indices] if tensors else [] for tensors in lists]


def _rate(group: Group, params: list[Any]) -> torch.Tensor:
    """The learning rate as a tensor that the operation can read where it runs."""
    lr = group["lr"]
    if not isinstance(lr, torch.Tensor):
        return torch.tensor(lr, dtype=torch.float64)
    return lr if lr.device == params[0].device else lr.cpu()


class SGD(_OnePass, torch.optim.SGD):
    """``torch.optim.SGD``: gradient descent, with momentum, dampening, Nesterov's step, weight decay."""

    _measured_as = "SGD"

    def _step_group(self, group: Group) -> None:
        lists = self._gather(group, 3)
        params, grads, buffers = lists
        if (path := self._path(group, lists, [])) == "kernels":
            new = [index for index, buffer in enumerate(buffers) if buffer is None]
            old = [index for index, buffer in enumerate(buffers) if buffer is not None] if new else []
            for index in new:
                buffers[index] = torch.empty_like(params[index], dtype=grads[index].dtype)
            for first, part in ((True, _chosen(lists, new)), (False, _chosen(lists, old) if new else lists)):
                for alike in _alike(part):
                    operations.sgd_(
                        *alike,
                        _rate(group, alike[0]),
                        group["momentum"],
                        group["dampening"],
                        float(group["weight_decay"]),
                        group["nesterov"],
                        group["maximize"],
                        first,
                    )
        else:
            sgd(
                *lists,
                has_sparse_grad=any(grad.is_sparse for grad in grads),
                **{
                    name: group[name]
                    for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
                },
                **_way(group, path, []),
                **self._scaling(),
            )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


class Adagrad(_OnePass, torch.optim.Adagrad):
    """``torch.optim.Adagrad``: the rate of each element falls with the sum of its squared gradients."""

    _measured_as = "Adagrad"

    def _step_group(self, group: Group) -> None:
        lists = self._gather(group, 4)
        options = {name: group[name] for name in ("lr_decay", "weight_decay", "eps", "maximize")}
        if (path := self._path(group, lists, lists[-1])) == "kernels":
            for alike in _alike(lists):
                operations.adagrad_(*alike, _rate(group, alike[0]), *options.values())
            return
        adagrad(
            *lists,
            has_sparse_grad=any(grad.is_sparse for grad in lists[1]),
            has_complex=any(param.is_complex() for param in lists[0]),
            lr=group["lr"],
            differentiable=group["differentiable"],
            **_way(group, path, lists[-1]),
            **options,
            **self._scaling(),
        )


class RMSprop(_OnePass, torch.optim.RMSprop):
    """``torch.optim.RMSprop``: gradients over their root mean square, with momentum, centered or not."""

    _measured_as = "RMSprop"

    def _step_group(self, group: Group) -> None:
        params, grads, squares, buffers, means, steps = self._gather(group, 6)
        lists = [params, grads, squares, means, buffers, steps]
        options = {name: group[name] for name in ("alpha", "eps", "weight_decay", "momentum", "maximize")}
        if self._path(group, lists, steps) == "kernels":
            for alike in _alike(lists):
                operations.rmsprop_(*alike, _rate(group, alike[0]), *options.values())
            return
        rmsprop(
            *lists,
            has_complex=any(param.is_complex() for param in params),
            **{name: group[name] for name in ("lr", "centered", "foreach", "capturable", "differentiable")},
            **options,
        )


class Adadelta(_OnePass, torch.optim.Adadelta):
    """``torch.optim.Adadelta``: gradients in the units of the changes that they have caused."""

    _measured_as = "Adadelta"

    def _step_group(self, group: Group) -> None:
        lists = self._gather(group, 5)
        options = {name: group[name] for name in ("rho", "eps", "weight_decay", "maximize")}
        if self._path(group, lists, lists[-1]) == "kernels":
            for alike in _alike(lists):
                operations.adadelta_(*alike, _rate(group, alike[0]), *options.values())
            return
        adadelta(
            *lists,
            has_complex=any(param.is_complex() for param in lists[0]),
            **{name: group[name] for name in ("lr", "foreach", "capturable", "differentiable")},
            **options,
        )


class _AdamStep(_OnePass):
    _measured_as = "Adam"

    def _step_group(self, group: Group) -> None:
        lists = self._gather(group, 6)
        options = {
            name: group[name] for name in ("eps", "weight_decay", "decoupled_weight_decay", "maximize")
        }
        beta1, beta2 = group["betas"]
        if (path := self._path(group, lists, lists[-1])) == "kernels":
            for alike in _alike(lists):
                operations.adam_(
                    *alike, _rate(group, alike[0]), float(beta1), float(beta2), *options.values()
                )
            return
        adam(
            *lists,
            beta1=beta1,
            beta2=beta2,
            has_complex=any(param.is_complex() for param in lists[0]),
            **{name: group[name] for name in ("lr", "amsgrad", "capturable", "differentiable")},
            **_way(group, path, lists[-1]),
            **options,
            **self._scaling(),
        )


class Adam(_AdamStep, torch.optim.Adam):
    """``torch.optim.Adam``: bias-corrected means of gradients over the root of those of their squares."""


class AdamW(_AdamStep, torch.optim.AdamW):
    """``torch.optim.AdamW``: Adam whose weight decay shrinks parameters instead of adding to gradients."""
