"""The forward pass of a block of the GPT that the labs train: module, compiled, exported; the same in JAX."""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.machine import Machine
from labs.programming_models import costs, jax_ways, torch_ways
from labs.programming_models.config import HEADS, Config
from labs.programming_models.costs import Cost
from labs.wording import us

NAMES = ("torch", "torch_compile", "torch_export", "jax", "jax_jit", "numpy")
EPSILON = 1e-5
NUMPY = (8, 6, 55)  # products, reductions, everything else with the views
CALLS, PRODUCTS = 38, 6
KERNELS = {"torch_compile": 4, "jax_jit": 35}  # of the rest, in a quick run
MODULES, JAX_CALLS = 13, 90


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


def reference(config: Config) -> list[Any]:
    return [block(config).double()(states(config).double())[0].numpy()]


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


def terms(config: Config) -> int:
    """Rounded products in a sum, the longest."""
    return 4 * config.width


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


def multiplications(config: Config) -> int:
    """Of the largest product."""
    return 4 * config.tokens * config.width**2


def numpy_numbers(config: Config) -> float:
    """In all operands and results of NumPy's block but the products': activations, and scores."""
    tokens = config.tokens
    return 138.0 * tokens * config.width + 12.0 * HEADS * tokens**2


def flops(config: Config) -> float:
    """Twelve width x width matrices a token (attention four, feed-forward eight), and the scores."""
    tokens, width = config.tokens, config.width
    return 2.0 * 12 * tokens * width**2 + 4.0 * tokens**2 * width


def cost(config: Config, machine: Machine, name: str) -> Cost:
    threads = costs.numpy_threads(multiplications(config)) if name == "numpy" else 1
    compute, work = costs.computing(machine, name, flops(config), PRODUCTS + 2, threads)
    if name == "numpy":
        calls, text = costs.numpy_calls(machine, *NUMPY[1:])
        largest = 4 * config.tokens * config.width
        moved, bytes_text = costs.numpy_bytes(machine, numpy_numbers(config), largest)
        exponentials = (2 * largest + HEADS * config.tokens**2) * machine["numpy_exp_s"]
        return Cost(
            calls + moved + exponentials + compute,
            f"{text} + {bytes_text} + tanh (as two exponentials) and softmax {us(exponentials)} + {work}",
            "views that are copied, and tanh against exp",
        )
    if name == "jax":
        call, wake = machine["jax_eager_array_call_s"], machine["jax_wake_s"]
        return Cost(
            JAX_CALLS * call + wake + compute,
            f"{JAX_CALLS} calls x {us(call)} + waking XLA's thread {us(wake)} + {work}",
            "functions of jax.numpy that are jitted themselves count as one, others as several calls",
        )
    if name == "jax_jit":
        pieces = PRODUCTS + 2 + KERNELS[name]
        entry, inner = costs.entry(machine, name), pieces * machine["jax_product_call_s"]
        return Cost(
            entry + inner + compute,
            f"a call {us(entry)} + {pieces} products and kernels {us(inner)} + {work}",
            "XLA spreads independent ones over threads, which must be free",
        )
    if name == "torch_compile":
        entry, kernels = machine["torch_compiled_call_s"], KERNELS[name] * machine["torch_call_s"]
        return Cost(
            entry + kernels + compute,
            f"a compiled call {us(entry)} + {KERNELS[name]} generated kernels {us(kernels)} + {work}",
            "attention, which stays a library call",
        )
    calls = (CALLS - PRODUCTS) * machine["torch_call_s"]
    if name == "torch_export":
        around, where = machine["torch_exported_call_s"], "entering the program"
    else:
        around, where = MODULES * machine["torch_module_call_s"], f"{MODULES} modules"
    return Cost(
        around + calls + compute,
        f"{where} {us(around)} + {CALLS - PRODUCTS} calls x {us(machine['torch_call_s'])} + {work}",
        "layer norm, GELU and attention cost more than a call; Python's code between the operations",
    )
