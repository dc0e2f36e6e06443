"""Rotary position embedding: sizes, bytes, peers."""

from __future__ import annotations

from typing import Any

import torch

from kernels import rotary
from kernels.rotary import reference
from kernels.spec import Arguments, Case, Operation, Step, tensor_bytes


def tables(length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times 10000**(-k / pairs), in float32 (Su et al. 2021, section 3.4.2)."""
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(1, pairs))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _case(*shape: int, interleaved: bool = False, transposed: bool = False) -> Case:
    """transposed: as a model has it, heads taken out of the last dimension of a projection."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        lie = (*shape[:-3], shape[-2], shape[-3], shape[-1]) if transposed else shape
        x = torch.randn(lie, generator=generator).to(dtype)
        cos, sin = tables(shape[-2], shape[-1] // 2)
        return {
            "x": x.transpose(-2, -3) if transposed else x,
            "cos": cos.to(dtype),
            "sin": sin.to(dtype),
            "interleaved": interleaved,
        }

    label = "x".join(map(str, shape)) + " interleaved" * interleaved + " transposed" * transposed
    return Case(label, make)


def _jax(arguments: Arguments, direction: str) -> Step | None:
    x = arguments["x"]
    if (
        direction != "forward"
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or arguments["interleaved"]
    ):
        return None
    import jax
    import jax.numpy as jnp

    def turn(x: Any, cos: Any, sin: Any) -> Any:
        first, second = jnp.split(x, 2, -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    arrays = [jnp.asarray(arguments[name].numpy()) for name in ("x", "cos", "sin")]
    compiled = jax.jit(turn)
    return lambda: compiled(*arrays).block_until_ready()


OPERATIONS = [
    Operation(
        name="rotary_embedding",
        function=rotary.rotary_embedding,
        reference=reference.rotary_embedding,
        eager=rotary.eager,
        cases=[
            _case(1, 2),
            _case(2, 3, 37, 64),
            _case(2, 3, 37, 64, interleaved=True),
            _case(2, 3, 13, 74),
            _case(3, 13, 74, interleaved=True, transposed=True),
            _case(2, 3, 17, 32, transposed=True),
            _case(2, 1, 2, 11, 46),
            _case(0, 3, 5, 8),
            _case(3, 0, 8),
        ],
        sizes=[_case(4, 12, 1024, 64)],
        bytes_moved=lambda arguments, backward: 2 * tensor_bytes(arguments["x"]),
        gradients=("x",),
        peers={"jax.jit": _jax},
        targets={"forward": 1.1, "backward": None},
        sized=lambda rows, columns: _case(1, 12, rows, columns),
        columns=64,
    )
]
