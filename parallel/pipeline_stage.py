"""One stage of a pipeline on its rank: micro-batches forward, and backward whole or in halves.

What a micro-batch needs for its backward is held from its forward on: the graph, and no output, which
belongs to the next stage once it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.pipeline_split import Sources, Split

Loss = Callable[[Any, Any], torch.Tensor]


class _Held:
    """A micro-batch between its forward and the end of its backward."""

    __slots__ = ("inputs", "roots", "split")

    def __init__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self.inputs = [tensor for tensor in inputs if tensor.requires_grad]
        self.roots: list[GradientEdge] = [get_gradient_edge(one) for one in outputs if one.requires_grad]
        self.split: Split | None = None


class StageRunner:
    """Runs ``module``, number ``index`` of the pipeline.

    early: gradients of weights that came with those of inputs in the step, though in a second half.
    """

    def __init__(self, index: int, module: nn.Module) -> None:
        self.index, self.module = index, module
        self._held: dict[int, _Held] = {}
        self._begun: dict[int, list[GradientEdge]] = {}  # where gradients begin, by micro-batch
        self._sources = Sources(module) if index == 0 else None
        self.early = 0

    def clear(self) -> None:
        """Before a step: forget what one that failed has left."""
        self._held.clear()
        self._begun.clear()
        self.early = 0
        if self._sources is not None:
            self._sources.take()

    def forward(self, microbatch: int, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The outputs, with their graph."""
        found = self.module(*inputs)
        outputs = tuple(found) if isinstance(found, tuple | list) else (found,)
        if self._sources is not None:
            self._begun[microbatch] = self._sources.take()
        return outputs

    def hold(self, microbatch: int, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        """Keep what the backward from ``outputs`` to ``inputs`` needs."""
        tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
        self._held[microbatch] = _Held(tensors, outputs)

    def backward(self, microbatch: int, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All gradients. Returns those of the inputs that have one."""
        held = self._held.pop(microbatch)
        self._begun.pop(microbatch, None)
        if held.roots:
            torch.autograd.backward(held.roots, gradients)
        return _filled([one.grad for one in held.inputs], held.inputs)

    def input_gradient(self, microbatch: int, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first half. Returns the gradients of the inputs that have one."""
        held = self._held[microbatch]
        sources = [get_gradient_edge(one) for one in held.inputs] or self._begun.pop(microbatch, [])
        found: list[torch.Tensor | None] = []
        if held.roots:
            held.split = Split(held.roots, sources)
            self.early += len(held.split.early)
            found = held.split.inputs(gradients)
        result = _filled(found[: len(held.inputs)], held.inputs)
        held.inputs, held.roots = [], []
        return result

    def weight_gradient(self, microbatch: int) -> None:
        """The second half."""
        split = self._held.pop(microbatch).split
        if split is not None:
            split.weights()


def _filled(gradients: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros for inputs that were not used."""
    gradients = [*gradients, *[None] * (len(inputs) - len(gradients))]
    return [
        torch.zeros_like(one) if gradient is None else gradient
        for gradient, one in zip(gradients, inputs, strict=True)
    ]
