"""Losses from passes over rows of logits: what is the same on the CPU and on a GPU.

A device brings three functions, and ``Passes`` makes the operations of them. ``linear_cross_entropy``
computes logits for some rows at a time, turns them into their own gradient where they lie, and multiplies
that on into the gradients of input and weight before the next rows come (the idea: Hsu et al. 2024,
"Liger Kernel: efficient Triton kernels for LLM training", section 3.2, FusedLinearCrossEntropy). Three matrix
products for loss and gradients, as many as with all logits at once; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.fresh_memory import in_huge_pages

_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
_LEAST_ROWS = 64
"""Logits at a time: few enough to be a small part of all, enough rows for the matrix products to be fast."""


def rows_at_once(rows: int, classes: int, device: str) -> int:
    """How many rows of logits ``linear_cross_entropy`` holds at a time."""
    return min(rows, max(_LEAST_ROWS, _CHUNK_ELEMENTS.get(device, 1 << 23) // max(1, classes)))


@dataclass(frozen=True)
class Passes:
    """survey(target, ignore_index, classes) -> how many targets count, having checked them.

    visit(logits, target, ignore_index, smoothing, losses, scale, gradient): see ``kernels.loss.cpu.visit``.
    total(losses, count) -> sum(losses) / count.
    """

    survey: Callable[..., Any]
    visit: Callable[..., None]
    total: Callable[..., torch.Tensor]

    def _scale(
        self, target: torch.Tensor, grad: torch.Tensor | None, count: Any, reduction: str
    ) -> torch.Tensor:
        """What a row's loss counts in the result, times the incoming gradient: one element or one a row."""
        if grad is None:
            scale = torch.ones(1, dtype=torch.float32, device=target.device)
        else:
            scale = grad.to(torch.float32).reshape(-1).contiguous()
        return scale / count if reduction == "mean" else scale

    def _reduced(self, losses: torch.Tensor, count: Any, reduction: str) -> torch.Tensor:
        return losses if reduction == "none" else self.total(losses, count if reduction == "mean" else 1)

    def cross_entropy(
        self, input: torch.Tensor, target: torch.Tensor, ignore_index: int, smoothing: float, reduction: str
    ) -> torch.Tensor:
        """The loss in float32; input (rows, classes) and target (rows,) contiguous."""
        count = self.survey(target, ignore_index, input.shape[1])
        losses = torch.empty(len(input), dtype=torch.float32, device=input.device)
        self.visit(input, target, ignore_index, smoothing, losses)
        return self._reduced(losses, count, reduction)

    def cross_entropy_with_gradient(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        grad: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
        reduction: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss in float32, and its gradient times ``grad`` (None is 1) with respect to input."""
        count = self.survey(target, ignore_index, input.shape[1])
        losses = torch.empty(len(input), dtype=torch.float32, device=input.device)
        gradient = in_huge_pages(torch.empty_like(input))
        scale = self._scale(target, grad, count, reduction)
        self.visit(input, target, ignore_index, smoothing, losses, scale, gradient)
        return self._reduced(losses, count, reduction), gradient

    def linear_cross_entropy(
        self,
        input: torch.Tensor,
        linear_weight: torch.Tensor,
        target: torch.Tensor,
        linear_bias: torch.Tensor | None,
        grad: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
        reduction: str,
        input_gradient: bool,
        weight_gradient: bool,
        bias_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss and wanted gradients times ``grad`` (None is 1), all in float32; the others are empty."""
        rows, classes = len(input), len(linear_weight)
        exact = input.dtype is torch.float32
        count = self.survey(target, ignore_index, classes)
        scale = self._scale(target, grad, count, reduction)
        # 16-bit logits' gradients keep their full size, since 1 / count could push float16 below its range.
        inside, after = (scale, None) if exact or len(scale) > 1 else (torch.ones_like(scale), scale)

        def new(wanted: bool, *shape: int) -> torch.Tensor:
            return torch.zeros(shape if wanted else (0,), dtype=torch.float32, device=input.device)

        grad_input = new(input_gradient, *input.shape)
        grad_weight = new(weight_gradient, *linear_weight.shape)
        grad_bias = new(bias_gradient, classes)
        losses = torch.empty(rows, dtype=torch.float32, device=input.device)
        wanted = input_gradient or weight_gradient or bias_gradient
        step = rows_at_once(rows, classes, input.device.type)
        buffer = input.new_empty(step, classes)
        for first in range(0, rows, max(1, step)):
            here = slice(first, first + step)
            part = input[here]
            logits = buffer[: len(part)]
            if linear_bias is None:
                torch.mm(part, linear_weight.t(), out=logits)
            else:
                torch.addmm(linear_bias, part, linear_weight.t(), out=logits)
            factor = inside[here] if len(inside) > 1 else inside
            gradient = logits if wanted else None
            self.visit(logits, target[here], ignore_index, smoothing, losses[here], factor, gradient)
            if input_gradient and exact:
                torch.mm(logits, linear_weight, out=grad_input[here])
            elif input_gradient:
                grad_input[here] = torch.mm(logits, linear_weight)
            if weight_gradient and exact:
                grad_weight.addmm_(logits.t(), part)
            elif weight_gradient:
                grad_weight += torch.mm(logits.t(), part)
            if bias_gradient:
                grad_bias += logits.sum(0, dtype=torch.float32)
        if after is not None:
            for kept in (grad_input, grad_weight, grad_bias):
                kept.mul_(after)
        return self._reduced(losses, count, reduction), grad_input, grad_weight, grad_bias
