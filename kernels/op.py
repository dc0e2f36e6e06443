"""How an operation becomes torch's: registered once, numba on the CPU, Triton on CUDA, torch's own elsewhere.

``register`` makes ``torch.ops.perflab.<name>`` with a fake (shapes for ``torch.compile``) and a backward, so
that autograd, ``torch.compile(fullgraph=True)`` and ``torch.library.opcheck`` work. ``use_torch`` is the
question each public function asks first: would torch's own operation serve better here?

A call costs microseconds of Python, which small tensors do not repay: below a measured size
(``kernels/crossover.json``, elements) the eager public function calls torch's op.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.direct import directly
from kernels.interpreter import interpreting, repair

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: what the kernels are compiled and checked for begins here, and so does Triton."""


class FallbackWarning(UserWarning):
    """The kernels do not take these tensors, and torch's own operation ran instead; or they cannot use what
    makes them fast."""


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: str | Callable[..., Any] = "",
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``perflab::<schema>`` and return what to call: the overload, which ``kernels.direct`` spares
    those who need no dispatcher.

    schema: ``"name(Tensor input, float eps) -> (Tensor, Tensor)"``; outputs are new tensors, and a mutated
    argument is written ``Tensor(a!)``. cpu: the implementation on CPU tensors. cuda: the
    implementation on CUDA tensors, or its ``"package.module:function"``: see ``imported_when_called``.
    fake: shapes and dtypes of the outputs, without data. setup_context and backward: as
    ``torch.library.register_autograd`` takes them.

    Under ``TRITON_INTERPRET=1`` the CUDA implementation takes CPU tensors too, so that the tests of every
    operation run its Triton kernels on a machine without a GPU.
    """
    name = schema.split("(", 1)[0].strip()
    qualified = f"perflab::{name}"
    torch.library.define(qualified, schema[len(name) :].strip())
    triton = imported_when_called(cuda) if isinstance(cuda, str) and cuda else cuda
    if triton and interpreting():
        repair()
        cpu = triton
    torch.library.impl(qualified, "cpu", cpu)
    if triton:
        torch.library.impl(qualified, "cuda", triton)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    implementations = {"cpu": cpu, **({"cuda": triton} if triton else {})}
    return directly(getattr(torch.ops.perflab, name).default, implementations, setup_context, backward)


def imported_when_called(place: str) -> Callable[..., Any]:
    """The function at ``package.module:function``, imported when it is first called (Triton)."""
    module, _, attribute = place.partition(":")

    @cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), attribute)

    def call(*arguments: Any, **options: Any) -> Any:
        return found()(*arguments, **options)

    return call


@cache
def _crossover() -> dict[str, dict[str, int]]:
    text = (Path(__file__).parent / "crossover.json").read_text()
    return json.loads(text)["elements"]


@cache
def crossover(name: str, device: str) -> int:
    """Elements below which the eager public function calls torch's op."""
    return _crossover().get(device, {}).get(name, 0)


@contextmanager
def without_crossover() -> Iterator[None]:
    """The kernels run at every size."""
    measured = globals()["crossover"]
    globals()["crossover"] = lambda name, device: 0
    try:
        yield
    finally:
        globals()["crossover"] = measured


_warned: set[tuple[str, str]] = set()


def use_torch(
    name: str,
    first: torch.Tensor,
    *others: torch.Tensor | None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    elements: int | None = None,
) -> bool:
    """True where torch's own operation should run: a small tensor, or one that the kernels do not take.

    Only the second is worth a ``FallbackWarning``, once for each operation and reason.
    """
    return is_small(name, first, elements) or not_taken(name, first, *others, dtypes=dtypes)


def is_small(name: str, first: torch.Tensor, elements: int | None = None) -> bool:
    """Whether an eager call is to be left to torch for its size, which loses least when asked first.

    elements: what is held against the crossover, where it is not the elements of ``first``.
    """
    if torch.compiler.is_compiling():
        return False
    kind = "cpu" if first.is_cpu else first.device.type
    return (first.numel() if elements is None else elements) < crossover(name, kind)


def not_taken(
    name: str, first: torch.Tensor, *others: torch.Tensor | None, dtypes: Sequence[torch.dtype] = FLOATS
) -> bool:
    """Whether there are no kernels for these tensors, which a ``FallbackWarning`` says once."""
    reason = _unsupported(first, others, dtypes)
    if reason and not torch.compiler.is_compiling():
        warn_once(name, reason)
    return bool(reason)


def _unsupported(
    first: torch.Tensor, others: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype]
) -> str:
    device, kind = first.device, "cpu" if first.is_cpu else first.device.type
    if kind not in ("cpu", "cuda"):
        return f"there are no kernels for device {kind!r}"
    if first.layout is not torch.strided:
        return f"there are no kernels for layout {first.layout}"
    if kind == "cuda" and (reason := gpu_lacks(device)):
        return reason
    for tensor in (first, *others):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"the kernels take {taken}, not {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != device:
            return f"the tensors are on {device} and {tensor.device}"
    return ""


def gpu_lacks(device: torch.device) -> str:
    """Why no Triton kernel can run on this CUDA device; empty where they can."""
    return _gpu_lacks(device)


# As torch.compiler.assume_constant_result has it, which would import the compiler, and Triton, now.
gpu_lacks._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _gpu_lacks(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the kernels for GPUs need triton, which is not installed"
    if not torch.version.hip and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        least, have = (".".join(map(str, capability)) for capability in (LEAST_CAPABILITY, found))
        return f"the kernels take GPUs of compute capability {least} and above, not {have}"
    return ""


def warn_once(name: str, reason: str) -> None:
    """Say that torch's own operation runs instead of ours, the first time for this reason."""
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        text, level, frame = f"kernels.{name}: {reason}; torch's own operation runs", 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
            level, frame = level + 1, frame.f_back  # to whoever called a function of ours
        warnings.warn(text, FallbackWarning, stacklevel=level)
