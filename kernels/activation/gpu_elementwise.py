"""Functions of one element on the GPU: one pair of Triton kernels for the whole family (formulas.py)."""

# Triton declares constants by annotation, and types nothing else.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.activation.formulas import FAMILY, Elementwise, translate
from kernels.activation.layout import flat, like

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _where(condition, left, right):
    return tl.where(condition, left, right)


@triton.jit
def _abs(x):
    return tl.abs(x)


FORMULAS = translate({"exp_nonpositive": _exp, "where": _where, "abs": _abs, "tl": tl}, triton.jit)
"""The formulas as Triton functions of float32."""

value: Any = None
gradient: Any = None  # for the two kernels below, ``_kernel`` puts one member's formulas here


def _forward(x, out, elements, first, second, PARAMETERS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    number = tl.load(x + offsets, mask=inside).to(tl.float32)
    if PARAMETERS == 0:
        result = value(number)
    elif PARAMETERS == 1:
        result = value(number, first)
    else:
        result = value(number, first, second)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)


def _backward(grad, kept, grad_input, elements, first, second, PARAMETERS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    incoming = tl.load(grad + offsets, mask=inside).to(tl.float32)
    number = tl.load(kept + offsets, mask=inside).to(tl.float32)
    if PARAMETERS == 0:
        result = gradient(incoming, number)
    elif PARAMETERS == 1:
        result = gradient(incoming, number, first)
    else:
        result = gradient(incoming, number, first, second)
    tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


@cache
def _kernel(member: Elementwise, direction: str) -> Any:
    """The kernel of this direction with this member's formula in it, and with its name."""
    template: Any = _forward if direction == "forward" else _backward
    names = {
        **globals(),
        "value": FORMULAS[member.value.__name__],
        "gradient": FORMULAS[member.gradient.__name__],
    }
    # Triton reads the source by the code's place and looks names up in the function's globals.
    copy = FunctionType(template.__code__, names, template.__name__)
    copy.__module__, copy.__annotations__ = __name__, template.__annotations__
    return triton.jit(copy, repr=lambda _: f"{member.name}_{direction}")


def configuration(element_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Four warps, each thread two 16-byte accesses a tensor: enough in flight to fill the memory's
    pipeline.
    """
    return {"BLOCK": 4 * 32 * 2 * 16 // element_size}, {"num_warps": 4}


def _launch(member: Elementwise, direction: str, tensors: list[torch.Tensor], parameters: Any) -> None:
    elements = tensors[0].numel()
    if elements == 0:
        return
    constants, options = configuration(tensors[0].element_size())
    first, second = (*map(float, parameters), 0.0, 0.0)[:2]
    _kernel(member, direction)[(triton.cdiv(elements, constants["BLOCK"]),)](
        *map(flat, tensors), elements, first, second, PARAMETERS=len(parameters), **constants, **options
    )


def _of(member: Elementwise) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    def forward(input: torch.Tensor, *parameters: float) -> torch.Tensor:
        out = torch.empty_like(input)
        _launch(member, "forward", [like(input, out), out], parameters)
        return out

    def backward(grad: torch.Tensor, kept: torch.Tensor, *parameters: float) -> torch.Tensor:
        out = torch.empty_like(kept)
        _launch(member, "backward", [like(grad, out), like(kept, out), out], parameters)
        return out

    return forward, backward


_FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    name + suffix: function
    for name, member in FAMILY.items()
    for suffix, function in zip(("", "_backward"), _of(member), strict=True)
}


def __getattr__(name: str) -> Any:
    """``gelu``, ``gelu_backward``, ...: two functions for each member, as ``elementwise.py`` names them."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compilations() -> list[Compilation]:
    """Each kernel as it is launched on bfloat16."""
    from kernels.ahead_of_time import Compilation

    constants, options = configuration(2)
    found = []
    for member in FAMILY.values():
        for direction, tensors in (("forward", ("x", "out")), ("backward", ("grad", "kept", "grad_input"))):
            types = dict.fromkeys(tensors, "*bf16!") | {"elements": "i32!", "first": "fp32", "second": "fp32"}
            found.append(
                Compilation(
                    label=f"{member.name} {direction} bf16",
                    kernel=_kernel(member, direction),
                    types=types,
                    constants={"PARAMETERS": len(member.parameters), **constants},
                    options=options,
                    operation=member.name.removesuffix("_tanh"),
                    direction=direction,
                )
            )
    return found
