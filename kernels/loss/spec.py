"""Losses: sizes, bytes, peers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kernels import loss
from kernels.loss import reference
from kernels.spec import Arguments, Case, Operation, Step, tensor_bytes


def _case(*shape: int, mean: float = 0.0, ignored: float = 0.0, **options: Any) -> Case:
    """Logits of this shape; some targets ignored."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        rows, classes = shape
        logits = 3 * torch.randn(rows, classes, generator=generator) + mean
        target = torch.randint(0, max(1, classes), (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < ignored] = options.get("ignore_index", -100)
        return {"input": logits.to(dtype), "target": target, **options}

    words = [f"{name} {value}" for name, value in {"mean": mean, "ignored": ignored}.items() if value]
    words += [f"{name} {value}" for name, value in options.items()]
    return Case(" ".join(["x".join(map(str, shape)), *words]), make)


def _linear_case(rows: int, features: int, classes: int, bias: bool = False, **options: Any) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        target = torch.randint(0, classes, (rows,), generator=generator)
        return {
            "input": random(rows, features),
            "linear_weight": random(classes, features) / max(1, features) ** 0.5,
            "target": target,
            "linear_bias": random(classes) if bias else None,
            **options,
        }

    words = [f"{rows}x{features}x{classes}", *(["bias"] if bias else [])]
    return Case(" ".join([*words, *(f"{name} {value}" for name, value in options.items())]), make)


def _bytes(arguments: Arguments, backward: bool) -> int:
    """The logits are read once, for the loss and the gradient; the gradient is written."""
    return tensor_bytes(arguments["input"])


def _linear_bytes(arguments: Arguments, backward: bool) -> int:
    return tensor_bytes(arguments["input"], arguments["linear_weight"])


def _linear_flops(arguments: Arguments, backward: bool) -> int:
    rows, features = arguments["input"].shape
    return (4 if backward else 2) * rows * features * arguments["linear_weight"].shape[0]


def _composed(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def _jax(arguments: Arguments, direction: str) -> Step | None:
    """``jax.jit`` of the loss, or of ``jax.value_and_grad``."""
    import jax
    import jax.numpy as jnp

    def mean(logits: Any, labels: Any) -> Any:
        log_sum = jax.scipy.special.logsumexp(logits, -1)
        return (log_sum - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]).mean()

    if direction == "backward" or arguments["input"].device.type != "cpu":
        return None
    logits, labels = (jnp.asarray(arguments[name].numpy()) for name in ("input", "target"))
    step = jax.jit(mean if direction == "forward" else jax.value_and_grad(mean))
    return lambda: jax.block_until_ready(step(logits, labels))


def _chunked_by_torch(arguments: Arguments, direction: str) -> Step | None:
    """Torch's own chunks (torch 2.13), which have a forward and backward in one as ours have."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions") or direction != "forward+backward":
        return None
    target, options = arguments["target"], torch.nn.LinearCrossEntropyOptions()
    input, linear_weight = (arguments[name].detach().requires_grad_() for name in ("input", "linear_weight"))

    def step() -> object:
        found = F.linear_cross_entropy(input, linear_weight, target, options=options)
        return torch.autograd.grad(found, (input, linear_weight))

    return step


OPERATIONS = [
    Operation(
        name="cross_entropy",
        function=loss.cross_entropy,
        reference=reference.cross_entropy,
        eager=F.cross_entropy,
        cases=[
            _case(1, 1),
            _case(23, 300, ignored=0.2),
            _case(5, 5003, label_smoothing=0.1, ignored=0.3),
            _case(257, 17, reduction="none", label_smoothing=0.3),
            _case(3, 2048, reduction="sum", ignore_index=3, ignored=0.4),
            _case(31, 129, mean=1000.0),
            _case(0, 8, reduction="sum"),
        ],
        sizes=[_case(512, 50304)],
        bytes_moved=_bytes,
        gradients=("input",),
        peers={"jax.jit": _jax},
        targets={"forward": None, "forward+backward": 2.3},
        sized=_case,
    ),
    Operation(
        name="linear_cross_entropy",
        function=loss.linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        eager=_composed,
        cases=[
            _linear_case(1, 500, 301),
            _linear_case(24, 48, 131, bias=True),
            _linear_case(67, 16, 300, reduction="none", label_smoothing=0.2),
        ],
        sizes=[_linear_case(1024, 512, 32000)],
        bytes_moved=_linear_bytes,
        flops=_linear_flops,
        gradients=("input", "linear_weight", "linear_bias"),
        peers={"torch chunks": _chunked_by_torch},
        targets={"forward+backward": 1.0},
        sized=lambda rows, columns: _linear_case(rows, columns, columns),
        counted=lambda arguments: len(arguments["input"]) * len(arguments["linear_weight"]),
        most=1 << 20,  # logits of some megabytes
    ),
]
