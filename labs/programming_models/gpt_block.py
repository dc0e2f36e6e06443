"""The forward pass of a block of the GPT that the labs train: module, compiled, exported; the same in JAX."""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.programming_models import jax_ways, torch_ways
from labs.programming_models.config import HEADS, Config

NAMES = ("torch", "torch_compile", "torch_export", "jax", "jax_jit", "numpy")
EPSILON = 1e-5


def block(config: Config) -> Any:
    """The module, the same parameters at each call; biases and norms are drawn too, so that each counts."""
    import torch

    from labs.models.configuration import GPTConfig
    from labs.models.layers import Block

    size = GPTConfig(width=config.width, heads=HEADS, context=config.tokens, activation="gelu_tanh")
    generator = torch.Generator().manual_seed(8)
    module = Block(size).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(config.width))
    return module


def states(config: Config) -> Any:
    """(1, tokens, width) float32."""
    import torch

    generator = torch.Generator().manual_seed(9)
    return torch.randn(1, config.tokens, config.width, generator=generator)


def reference(config: Config) -> Any:
    return block(config).double()(states(config).double())


def written_out(xp: Any, p: dict[str, Any], x: Any) -> Any:
    """The block for arrays (tokens, width), in the words that NumPy and jax.numpy (``xp``) share.

    p: the module's parameters by their names; a linear layer's weight is (out, in), as torch keeps it.
    """
    tokens, width = x.shape

    def linear(name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / xp.sqrt(variance + EPSILON) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def heads(name: str, x: Any) -> Any:
        return linear(f"attention.{name}", x).reshape(tokens, HEADS, width // HEADS).swapaxes(0, 1)

    y = norm("attention_norm", x)
    query, key, value = (heads(name, y) for name in ("query", "key", "value"))
    scores = query @ key.swapaxes(1, 2) * (1.0 / math.sqrt(width // HEADS))
    scores = xp.where(xp.arange(tokens)[:, None] >= xp.arange(tokens), scores, -xp.inf)
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    x = x + linear("attention.output", (weights @ value).swapaxes(0, 1).reshape(tokens, width))
    y = linear("feed_forward.up", norm("feed_forward_norm", x))
    y = 0.5 * y * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y * y * y)))
    return x + linear("feed_forward.down", y)


def setup(name: str, config: Config, recorder: Recorder) -> Step:
    module, x = block(config), states(config)
    if name in ("jax", "jax_jit", "numpy"):
        p: dict[str, Any] = {key: value.numpy() for key, value in module.named_parameters()}
        if name == "numpy":
            import numpy

            there = x[0].numpy()
            return lambda: written_out(numpy, p, there)
        import jax.numpy as jnp

        arguments = ({key: jnp.asarray(value) for key, value in p.items()}, jnp.asarray(x[0].numpy()))

        def forward(p: dict[str, Any], x: Any) -> Any:
            return written_out(jnp, p, x)

        if name == "jax":
            return jax_ways.eager(forward, arguments)
        return jax_ways.Jitted(forward, arguments, recorder)
    if name == "torch":
        return torch_ways.Eager(module, (x,))
    if name == "torch_export":
        return torch_ways.exported(module, (x,), recorder)
    return torch_ways.Compiled(lambda x: module(x), (x,), recorder)
