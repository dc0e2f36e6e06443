"""Functions of one element on the CPU: one generator of loops for the whole family (formulas.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.activation.formulas import FAMILY, Elementwise, translate
from kernels.activation.layout import like
from kernels.blocks import BLOCK, LINE, part_of, read_ahead, stream, write_ahead
from kernels.fresh_memory import in_huge_pages
from kernels.simd import exp_nonpositive_float32, full_width, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_streamed
from kernels.threads import Chunked, chunked, chunks_of

LEAST = 8192
"""Elements that repay a chunk of their own."""


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function that becomes part of the loop it is called from."""
    return njit(error_model="numpy", fastmath={"contract"}, forceinline=True)(function)


@inline
def _where(condition: Any, left: Any, right: Any) -> Any:
    return left if condition else right


@intrinsic
def _as_float32(typing: Any, numbers: Any) -> Any:
    """A tuple of float64 as float32, to be multiplied with elements without widening them."""
    if not isinstance(numbers, types.UniTuple | types.Tuple) or set(numbers) - {types.float64}:
        return None
    made = types.UniTuple(types.float32, len(numbers))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[0], len(numbers))
        return context.make_tuple(builder, made, [builder.fptrunc(v, ir.FloatType()) for v in values])

    return made(numbers), codegen


FORMULAS = translate(
    {"exp_nonpositive": exp_nonpositive_float32, "where": _where, "abs": abs}, inline, np.float32
)
"""The formulas as numba functions of float32, inlined where they are called."""


@cache
def forward_body(member: Elementwise) -> Chunked:
    """``out = value(x)`` over flat tensors of one size, any of the three dtypes."""
    value = FORMULAS[member.value.__name__]

    @inline
    def fill(x, out, numbers):
        full_width()
        for i in range(out.size):
            out[i] = narrow(value(widen(x[i]), *numbers), out)

    @chunked
    def forward(chunk, chunks, x, streamed, out, *parameters):
        full_width()
        numbers = _as_float32(parameters)
        low, high = part_of(x.size, chunk, chunks)
        # Slices: an index that might be negative counts from the end, which makes every load a gather.
        x, out = x[low:high], out[low:high]
        staged = np.empty(BLOCK, out.dtype)
        for at in range(0, out.size, BLOCK):
            read_ahead(x, at)
            source = x[at : at + BLOCK]
            if streamed:
                part = staged[: source.size]
                fill(source, part, numbers)
                stream(part, out, at)
            else:
                write_ahead(out, at)
                fill(source, out[at : at + BLOCK], numbers)
        store_fence()

    return forward


@cache
def backward_body(member: Elementwise) -> Chunked:
    """``grad_input = gradient(grad, kept)`` over flat tensors of one size."""
    gradient = FORMULAS[member.gradient.__name__]

    @inline
    def fill(grad, kept, out, numbers):
        full_width()
        for i in range(out.size):
            out[i] = narrow(gradient(widen(grad[i]), widen(kept[i]), *numbers), out)

    @chunked
    def backward(chunk, chunks, grad, kept, streamed, grad_input, *parameters):
        full_width()
        numbers = _as_float32(parameters)
        low, high = part_of(kept.size, chunk, chunks)
        grad, kept, grad_input = grad[low:high], kept[low:high], grad_input[low:high]
        staged = np.empty(BLOCK, grad_input.dtype)
        for at in range(0, grad_input.size, BLOCK):
            read_ahead(grad, at)
            read_ahead(kept, at)
            g, k = grad[at : at + BLOCK], kept[at : at + BLOCK]
            if streamed:
                part = staged[: g.size]
                fill(g, k, part, numbers)
                stream(part, grad_input, at)
            else:
                write_ahead(grad_input, at)
                fill(g, k, grad_input[at : at + BLOCK], numbers)
        store_fence()

    return backward


def forward(name: str) -> Callable[..., torch.Tensor]:
    """``function(input, *parameters)`` of the member with this name."""
    member = FAMILY[name]

    def run(input: torch.Tensor, *parameters: float) -> torch.Tensor:
        out = in_huge_pages(torch.empty_like(input))
        size = out.numel()
        chunks = chunks_of(size, LEAST)
        read, written = (like(input, out), size), (out, size)
        forward_body(member)(chunks, chunks, read, is_streamed(out, LINE), written, *parameters)
        return out

    return run


def backward(name: str) -> Callable[..., torch.Tensor]:
    """``function(grad, kept, *parameters)`` of the member with this name."""
    member = FAMILY[name]

    def run(grad: torch.Tensor, kept: torch.Tensor, *parameters: float) -> torch.Tensor:
        out = in_huge_pages(torch.empty_like(kept))
        size = out.numel()
        chunks = chunks_of(size, LEAST)
        read = [(like(tensor, out), size) for tensor in (grad, kept)]
        backward_body(member)(chunks, chunks, *read, is_streamed(out, LINE), (out, size), *parameters)
        return out

    return run
