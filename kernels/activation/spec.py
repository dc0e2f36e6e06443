"""Activations: sizes, bytes, peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from kernels import activation
from kernels.activation import reference
from kernels.spec import Arguments, Case, Operation, Peer, Step, tensor_bytes

_TIMED = (8192, 1024)


def _softmax_case(*shape: int, dim: int = -1) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return {"input": 3 * torch.randn(shape, generator=generator).to(dtype), "dim": dim}

    return Case("x".join(map(str, shape)) + ("" if dim == -1 else f" dim {dim}"), make)


def _case(*shape: int, **scalars: Any) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return {"input": 3 * torch.randn(shape, generator=generator).to(dtype), **scalars}

    label = " ".join(["x".join(map(str, shape)), *(f"{k} {v}" for k, v in scalars.items())])
    return Case(label, make)


def _pair_case(*shape: int, halves: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        if halves:
            both = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
            gate, up = both.chunk(2, -1)
        else:
            gate, up = torch.randn(2, *shape, generator=generator).to(dtype)
        return {"gate": gate, "up": up}

    return Case("x".join(map(str, shape)) + (" halves" if halves else ""), make)


def _written_out(function: Callable[..., Any]) -> Peer:
    """torch's ``out=`` form, into memory made once."""

    def build(arguments: Arguments, direction: str) -> Step | None:
        if direction != "forward":
            return None
        out = torch.empty_like(arguments["input"])
        return lambda: function(**arguments, out=out)

    return build


def _jax(function: Callable[..., Any]) -> Peer:
    """``jax.jit`` of ``function(jax, **arrays)``, forward only."""

    def build(arguments: Arguments, direction: str) -> Step | None:
        first = next(iter(arguments.values()))
        if direction != "forward" or first.dtype != torch.float32 or first.device.type != "cpu":
            return None
        import jax

        arrays = [jax.numpy.asarray(v.numpy()) for v in arguments.values() if isinstance(v, torch.Tensor)]
        compiled = jax.jit(lambda *values: function(jax, *values))
        return lambda: compiled(*arrays).block_until_ready()

    return build


def _torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _elementwise(
    name: str, *cases: Case, options: Mapping[str, Any] = MappingProxyType({}), **more: Any
) -> Operation:
    """One of the family; each has an empty case and one of primes. options: of the call that is timed."""
    eager = getattr(F, name)
    if name in ("sigmoid", "tanh"):  # F's own are deprecated names of these
        eager = getattr(torch, name)
    return Operation(
        name=name,
        function=getattr(activation, name),
        reference=getattr(reference, name),
        eager=eager,
        cases=[_case(0, 3), _case(37, 131), *cases],
        bytes_moved=lambda arguments, backward: (2 + backward) * tensor_bytes(arguments["input"]),
        gradients=("input",),
        sized=partial(_case, **options),
        sizes=[_case(*_TIMED, **options)],
        **more,
    )


def _gelu_of_jax(approximate: bool) -> Peer:
    return _jax(lambda jax, x: jax.nn.gelu(x, approximate=approximate))


OPERATIONS = [
    Operation(
        name="softmax",
        function=activation.softmax,
        reference=reference.softmax,
        eager=F.softmax,
        cases=[
            _softmax_case(1, 1),
            _softmax_case(3, 17),
            _softmax_case(5, 1024),
            _softmax_case(2, 31, 127),
            _softmax_case(7, 13, dim=0),
            _softmax_case(2, 5, 900, dim=1),
            _softmax_case(0, 8),
            _softmax_case(4099, 3),
        ],
        sizes=[_softmax_case(*_TIMED)],
        bytes_moved=lambda arguments, backward: (2 + backward) * tensor_bytes(arguments["input"]),
        gradients=("input",),
        peers={
            "out=": _written_out(torch.softmax),
            "jax.jit": _jax(lambda jax, x: jax.nn.softmax(x, -1)),
        },
        targets={"forward": 1.15, "backward": None},
        sized=_softmax_case,
    ),
    _elementwise(
        "gelu",
        peers={"out=": _written_out(torch._C._nn.gelu), "jax.jit": _gelu_of_jax(False)},
        targets={"forward": 1.0, "backward": None},
    ),
    _elementwise(
        "gelu",
        _case(61, 67, approximate="tanh"),
        options={"approximate": "tanh"},
        measured_as="gelu_tanh",
        peers={"out=": _written_out(torch._C._nn.gelu), "jax.jit": _gelu_of_jax(True)},
        targets={"forward": 1.05, "backward": None},
    ),
    _elementwise("silu", peers={"jax.jit": _jax(lambda jax, x: jax.nn.silu(x))}),
    _elementwise("sigmoid", peers={"out=": _written_out(torch.sigmoid)}),
    _elementwise("tanh", peers={"out=": _written_out(torch.tanh)}),
    _elementwise("relu"),
    _elementwise("leaky_relu", _case(53, 71, negative_slope=-0.3)),
    _elementwise("softplus", _case(53, 71, beta=2.5, threshold=3.0)),
    _elementwise("elu", _case(53, 71, alpha=1.7)),
    Operation(
        name="swiglu",
        function=activation.swiglu,
        reference=reference.swiglu,
        eager=_torch_swiglu,
        cases=[
            _pair_case(1, 1),
            _pair_case(37, 131),
            _pair_case(3, 11, 127, halves=True),
            _pair_case(0, 4),
        ],
        sizes=[_pair_case(*_TIMED)],
        bytes_moved=lambda arguments, backward: (5 if backward else 3) * tensor_bytes(arguments["gate"]),
        gradients=("gate", "up"),
        peers={"jax.jit": _jax(lambda jax, gate, up: jax.nn.silu(gate) * up)},
        targets={"forward": 1.1, "backward": None},
        sized=_pair_case,
    ),
]
