"""Normalisation: sizes, bytes, peers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels import normalization
from kernels.normalization import reference
from kernels.spec import Arguments, Case, Operation, Peer, Step, tensor_bytes


def _case(
    *shape: int, over: int = 1, parameters: str = "own", mean: float = 0.0, added: bool, biased: bool
) -> Case:
    """over: dimensions normalised. parameters: of the input's dtype ("own"), "float32" or "none"."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def random(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(sizes, generator=generator).to(of)

        made: Arguments = {"input": (random(*shape, of=torch.float32) + mean).to(dtype)}
        if added:
            made["residual"] = random(*shape)
        made["normalized_shape"] = shape[-over:]
        kind = torch.float32 if parameters == "float32" else dtype
        if parameters != "none":
            made["weight"] = random(*shape[-over:], of=kind)
            if biased:
                made["bias"] = random(*shape[-over:], of=kind)
        return made

    notes = [
        f"over {over}" if over > 1 else "",
        f"{parameters} parameters" if parameters != "own" else "",
        f"mean {mean:g}" if mean else "",
    ]
    return Case(" ".join(["x".join(map(str, shape)), *filter(None, notes)]), make)


def _cases(added: bool, biased: bool) -> list[Case]:
    case = partial(_case, added=added, biased=biased)
    return [
        case(37, 61),
        case(9, 5, 128),
        case(3, 1024, mean=100.0),
        case(131, 7, 11, over=2, parameters="float32"),
        case(2, 4099, parameters="none"),
        case(1, 1),
        case(0, 8),
    ]


def _add_layer_norm(input: torch.Tensor, residual: torch.Tensor, *rest: Any, **options: Any) -> Any:
    total = input + residual
    return F.layer_norm(total, *rest, **options), total


def _add_rms_norm(input: torch.Tensor, residual: torch.Tensor, *rest: Any, **options: Any) -> Any:
    total = input + residual
    return F.rms_norm(total, *rest, **options), total


def _bytes(arguments: Arguments, backward: bool) -> int:
    """Forward: input and residual in, output and sum out. Backward: their gradients, and what was kept."""
    tensors = 2 * (2 if "residual" in arguments else 1) + backward
    if backward and "residual" in arguments:
        tensors -= 1  # input and residual have one gradient
    return tensors * tensor_bytes(arguments["input"])


def _out(arguments: Arguments, direction: str) -> Step | None:
    """torch's own forward into tensors made once."""
    if direction != "forward":
        return None
    values = [arguments.get(name) for name in ("input", "normalized_shape", "weight", "bias")]
    made = torch.ops.aten.native_layer_norm.default(*values, 1e-5)

    def step() -> object:
        return torch.ops.aten.native_layer_norm.out(*values, 1e-5, out0=made[0], out1=made[1], out2=made[2])

    return step


def _jax(centred: bool) -> Peer:
    def peer(arguments: Arguments, direction: str) -> Step | None:
        if arguments["input"].device.type != "cpu" or "residual" in arguments:
            return None
        import jax
        import jax.numpy as jnp

        def norm(x: Any, weight: Any, bias: Any) -> Any:
            if centred:
                x = x - x.mean(-1, keepdims=True)
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight + bias

        def forward(values: Any) -> Any:
            return norm(values[0], values[1], values[2] if centred else 0.0)

        names = ("input", "weight", "bias") if centred else ("input", "weight")
        values = tuple(jnp.asarray(arguments[name].detach().numpy()) for name in names)
        if direction == "forward":
            compiled = jax.jit(forward)
            return lambda: compiled(values).block_until_ready()
        weights = jnp.asarray(torch.randn(arguments["input"].shape).numpy())
        # The backward of one forward, its residuals made once: a vjp is a pytree that jit can take.
        _, pull = jax.vjp(forward, values)
        backward = jax.jit(lambda pull, weights: pull(weights))
        return lambda: jax.block_until_ready(backward(pull, weights))

    return peer


def _operation(name: str, eager: Any, peers: dict[str, Peer], targets: dict[str, float | None]) -> Operation:
    added, biased = name.startswith("add_"), name.endswith("layer_norm")
    return Operation(
        name=name,
        function=getattr(normalization, name),
        reference=getattr(reference, name),
        eager=eager,
        cases=_cases(added=added, biased=biased),
        sizes=[_case(8192, 1024, added=added, biased=biased)],
        bytes_moved=_bytes,
        gradients=("input", *(["residual"] if added else []), "weight", *(["bias"] if biased else [])),
        peers=peers,
        targets=targets,
        sized=partial(_case, added=added, biased=biased),
    )


OPERATIONS = [
    _operation(
        "layer_norm",
        F.layer_norm,
        {"out=": _out, "jax.jit": _jax(True)},
        {"forward": 1.35, "backward": 1.3},
    ),
    _operation("rms_norm", F.rms_norm, {"jax.jit": _jax(False)}, {"forward": 1.45, "backward": None}),
    _operation("add_layer_norm", _add_layer_norm, {}, {"forward": None, "backward": None}),
    _operation("add_rms_norm", _add_rms_norm, {}, {"forward": None, "backward": None}),
]
