"""Calls of a registered operation that need nothing of torch's dispatcher go to its implementation at once.

The way through the dispatcher to an operation that is written in Python, and back, costs some twenty
microseconds where everything lies in the caches, and several times that after a tensor has swept them. It
serves whoever watches or transforms calls: modes (counting FLOPs, fake tensors, tracing, a default device),
function transforms, profilers, tensors of other classes, negated views. Where nobody does, the eager call and
its gradient are the same without it.

What is registered for an operation from outside, a rule for autocast for instance, counts in the dispatcher
alone; an ``ExecutionTraceObserver`` without a profiler sees none of ours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import contains
from typing import Any

import torch
from torch._ops import OpOverload

Implementation = Callable[..., Any]

_KINDS: dict[str, frozenset[type]] = {
    "Tensor": frozenset({torch.Tensor, torch.nn.Parameter}),
    "Optional[Tensor]": frozenset({torch.Tensor, torch.nn.Parameter, type(None)}),
    "int": frozenset({int}),
    "float": frozenset({float}),
    "bool": frozenset({bool}),
    "str": frozenset({str}),
}
"""Type in a schema -> classes of what need not be converted for it, nor has a will of its own."""


@cache
def _keys_of(device: str) -> frozenset[int]:
    """Dispatch keys, as bits, of a plain tensor of this device: made in inference mode, and outside it."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


@cache
def _unwatched() -> frozenset[int]:
    """Dispatch keys, as bits, that a thread adds to those of its tensors while nobody watches: in inference
    mode and outside it."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_tls_local_include_set().raw_repr())
    return frozenset(found)


# Found in a thread of its own: a mode may be active in this one.
_thread = threading.Thread(target=_unwatched)
_thread.start()
_thread.join()


def _device_of(arguments: tuple[Any, ...], kinds: Sequence[frozenset[type]]) -> str | None:
    """The type of the device on which all of these are plain tensors; None where the dispatcher is needed.

    kinds: the classes that each argument may have.
    """
    if (
        len(arguments) != len(kinds)
        or not all(map(contains, kinds, map(type, arguments)))
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _unwatched()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled  # of all threads
    ):
        return None
    device = "cpu" if arguments[0].is_cpu else arguments[0].device.type
    if device not in ("cpu", "cuda"):
        return None
    keys = _keys_of(device)
    for value in arguments:
        if isinstance(value, torch.Tensor) and torch._C._dispatch_keys(value).raw_repr() not in keys:
            return None
    return device


def _with_gradient(
    name: str, run: Implementation, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Implementation:
    """The implementation as one node of autograd's graph, named as the dispatcher's would be."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), body).apply  # type: ignore[attr-defined]


def directly(
    overload: OpOverload,
    implementations: Mapping[str, Implementation],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``overload``, or what it would end in: same arguments, results and gradients.

    implementations: type of device -> what is registered for it. setup_context and backward: as
    ``torch.library.register_autograd`` takes them, or None for an operation without a gradient.
    """
    schema = overload._schema
    if schema.is_mutable:  # the dispatcher keeps account of what is written to
        return overload
    kinds = [_KINDS[str(argument.type)] for argument in schema.arguments]
    differentiable: dict[str, Implementation] = {}
    if backward is not None and setup_context is not None:
        name = f"GeneratedBackwardFor_{overload._namespace}_{overload._opname}_{overload._overloadname}"
        differentiable = {
            device: _with_gradient(name, run, setup_context, backward)
            for device, run in implementations.items()
        }

    def call(*arguments: Any, **named: Any) -> Any:
        if named or torch.compiler.is_compiling():
            return overload(*arguments, **named)
        device = _device_of(arguments, kinds)
        recorded = (
            torch.is_grad_enabled()
            and torch._C._any_requires_grad(*arguments)
            and not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradOther)
        )
        found = (differentiable if recorded else implementations).get(device or "")
        return (found or overload)(*arguments)

    return call
