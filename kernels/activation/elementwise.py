"""The registered operations of the elementwise family, two for each member: its value and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.activation import cpu_elementwise
from kernels.activation.formulas import FAMILY, Elementwise
from kernels.op import register


def _register(member: Elementwise) -> Any:
    scalars = "".join(f", float {name}" for name in member.parameters)
    place = "kernels.activation.gpu_elementwise"

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output if member.keeps_output else inputs[0])
        ctx.parameters = inputs[1:]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (gradient(grad, kept, *ctx.parameters), *(None for _ in ctx.parameters))

    gradient = register(
        f"{member.name}_backward(Tensor grad, Tensor kept{scalars}) -> Tensor",
        cpu=cpu_elementwise.backward(member.name),
        cuda=f"{place}:{member.name}_backward",
        fake=lambda grad, kept, *parameters: torch.empty_like(kept),
    )
    return register(
        f"{member.name}(Tensor input{scalars}) -> Tensor",
        cpu=cpu_elementwise.forward(member.name),
        cuda=f"{place}:{member.name}",
        fake=lambda input, *parameters: torch.empty_like(input),
        setup_context=keep,
        backward=backward,
    )


CALLS: dict[str, Callable[..., torch.Tensor]] = {name: _register(member) for name, member in FAMILY.items()}
"""``CALLS[name](input, *parameters)``, with autograd."""
