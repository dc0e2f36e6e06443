"""Local SGD and DiLoCo: ranks step by themselves and agree every H steps, instead of at every step.

    optimizer = LocalSGD(model, torch.optim.AdamW(model.parameters()), every=8)
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.synchronize()

- Local SGD (Stich 2018, "Local SGD Converges Fast and Communicates Little", algorithm 1): every ``every``
  steps the parameters become their mean over the ranks. A H-th of the bytes of synchronous SGD, and ranks
  wait for each other only there (`parallel.straggler` says what that saves). With ``every=1`` and plain SGD
  it *is* synchronous SGD.
- Post-local SGD (Lin et al. 2018, "Don't Use Large Mini-Batches, Use Local SGD", section 3): the first
  ``warmup`` steps are synchronous, with averaged gradients, where large steps in different directions would
  hurt.
- DiLoCo (Douillard et al. 2023, algorithm 1): AdamW inside; outside, what a round has moved the mean by is a
  gradient ("pseudo-gradient") for SGD with Nesterov momentum on the parameters that the round began with.
  With an outer learning rate of 1 and no momentum it is local SGD.

The state of the inner optimizer stays on its rank, as in all three papers. So ranks differ in it, and
between two averagings in the parameters too: save both as `parallel.checkpoint.PerRank`, and this object as
it is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.same_module import check_alike, synchronise_module

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class LocalSGD:
    """Steps ``optimizer`` on this rank and averages ``module``'s trainable parameters every ``every`` steps.

    warmup: steps before, in which gradients are averaged instead. Construction gives all ranks rank 0's
    parameters and buffers; buffers and frozen parameters are then left alone. Gradients are accumulated by
    calling ``backward`` several times before `step`.

    Raises ValueError on all ranks if they disagree on the module or the settings.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int,
        warmup: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if every < 1 or warmup < 0:
            raise ValueError(f"every is at least 1 and warmup at least 0 steps, not {every} and {warmup}")
        self.optimizer, self.every, self.warmup, self.group = optimizer, every, warmup, group
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.steps, self.apart = 0, False  # apart: a step has been made alone since ranks last agreed
        settings = [f"every={every}, warmup={warmup}"]
        check_alike("settings", settings, group, "all ranks average in the same steps")
        synchronise_module(module, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of the optimizer, on averaged gradients during the warm-up, and the averaging when it is
        due."""
        self.steps += 1
        if self.steps <= self.warmup:
            average_gradients(self.parameters, self.group)
        self.optimizer.step()
        self.apart = self.steps > self.warmup
        if self.apart and (self.steps - self.warmup) % self.every == 0:
            self.synchronize()

    def synchronize(self) -> None:
        """The ranks agree now, if a step has been made alone since they last did; also after the last step
        of a training. On every rank."""
        if self.apart:
            self._agree()
            self.apart = False

    @torch.no_grad()
    def _agree(self) -> None:
        """The parameters become their mean over the ranks."""
        for parameter, mean in zip(self.parameters, average(self.parameters, self.group), strict=True):
            parameter.copy_(mean)

    def held(self) -> list[torch.Tensor]:
        """Tensors that it keeps beside the model's and the inner optimizer's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks; the inner optimizer has a state of its own."""
        return {"steps": self.steps, "apart": self.apart}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.apart = state["steps"], state["apart"]


class DiLoCo(LocalSGD):
    """Local SGD whose rounds end with a step of an outer optimizer, by default the paper's (section 3.1).

    outer: makes the outer optimizer for a list of parameters (float32 copies where the module's have 16
    bits).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int,
        warmup: int = 0,
        group: dist.ProcessGroup | None = None,
        outer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(
            parameters, lr=0.7, momentum=0.9, nesterov=True
        ),
    ) -> None:
        super().__init__(module, optimizer, every, warmup, group)
        self.start = [_sum_in(p.detach()).clone().requires_grad_() for p in self.parameters]
        self.outer = outer(list(self.start))

    def step(self) -> None:
        super().step()
        if self.steps == self.warmup:  # the first round begins where the warm-up ended
            self._begin_round()

    def _begin_round(self) -> None:
        with torch.no_grad():
            for start, parameter in zip(self.start, self.parameters, strict=True):
                start.copy_(parameter)

    @torch.no_grad()
    def _agree(self) -> None:
        """One step of the outer optimizer, from where the round began."""
        for start, mean in zip(self.start, average(self.parameters, self.group), strict=True):
            start.grad = start - mean
        self.outer.step()
        for start, parameter in zip(self.start, self.parameters, strict=True):
            parameter.copy_(start)
            start.grad = None

    def held(self) -> list[torch.Tensor]:
        momenta = [value for state in self.outer.state.values() for value in state.values()]
        return [*self.start, *(value for value in momenta if isinstance(value, torch.Tensor))]

    def state_dict(self) -> dict[str, Any]:
        start = [tensor.detach() for tensor in self.start]
        return {**super().state_dict(), "start": start, "outer": self.outer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for start, saved in zip(self.start, state["start"], strict=True):
                start.copy_(saved)
        self.outer.load_state_dict(state["outer"])


def average_one_by_one(
    tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """The means over the ranks, naively: a collective, and so a latency, for every tensor."""
    means = [_sum_in(tensor.detach()).clone() for tensor in tensors]
    for mean in means:
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return means


def average(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """The means over the ranks: one collective for all tensors of a dtype and device. 16 bits are summed in
    32."""
    tensors = list(tensors)
    means: dict[int, torch.Tensor] = {}
    for alike in _alike(tensors).values():
        flat = torch.cat([_sum_in(tensor.detach()).reshape(-1) for tensor in alike])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        parts = flat.split([tensor.numel() for tensor in alike])
        means |= {id(tensor): part.view(tensor.shape) for tensor, part in zip(alike, parts, strict=True)}
    return [means[id(tensor)] for tensor in tensors]


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Gradients become their means. A rank without one counts as zero; where no rank has one, none
    appears."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = [torch.tensor(p.grad is not None, dtype=_sum_in(p).dtype, device=p.device) for p in parameters]
    for alike in _alike(list(zip(grads, parameters, present, strict=True)), of=lambda item: item[0]).values():
        flat = torch.cat(
            [_sum_in(grad).reshape(-1) for grad, _, _ in alike] + [flag.view(1) for _, _, flag in alike]
        )
        dist.all_reduce(flat, group=group)
        values, flags = flat[: -len(alike)] / dist.get_world_size(group), flat[-len(alike) :].tolist()
        parts = values.split([grad.numel() for grad, _, _ in alike])
        for (grad, parameter, _), part, flag in zip(alike, parts, flags, strict=True):
            if flag:
                parameter.grad = grad.copy_(part.view(grad.shape))


def predict_communication(
    module: nn.Module, step: int, every: int, warmup: int = 0, *, world_size: int = 2
) -> dict[str, int]:
    """{operation: payload bytes} of one rank in step ``step``, counted from 1; nothing in most. DiLoCo's
    are the same, and those of any number of ranks but one, which has nobody to communicate with."""
    if world_size == 1:
        return {}
    trainable = [p for p in module.parameters() if p.requires_grad]
    elements = [(p.numel(), _sum_in(p.new_empty(0)).element_size()) for p in trainable]
    if step <= warmup:  # a gradient brings one more element: whether there is one
        return {"all_reduce": sum((count + 1) * size for count, size in elements)}
    if (step - warmup) % every == 0:
        return {"all_reduce": sum(count * size for count, size in elements)}
    return {}


def _sum_in(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the type that it is summed in."""
    return tensor.float() if tensor.dtype in SIXTEEN_BIT else tensor


def _alike(items: list[Any], of: Callable[[Any], torch.Tensor] = lambda item: item) -> dict[Any, list[Any]]:
    """Items by dtype and device of their tensors, in order."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        tensor = of(item)
        found.setdefault((tensor.dtype, tensor.device), []).append(item)
    return found
