"""Layer and root-mean-square normalisation, also fused with a residual: torch.nn.functional's signatures.

Statistics are float32 and are kept in float32 whatever the input is. 16-bit inputs go with parameters of
their own dtype or of float32, as torch takes them; the parameters' gradients have the parameters' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels import functional as F
from kernels.normalization import cpu, cpu_backward
from kernels.op import imported_when_called, is_small, not_taken, register


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last ``len(normalized_shape)`` dimensions.

    Shapes, errors and results as ``torch.nn.functional.layer_norm``: input (*, *normalized_shape), weight and
    bias (*normalized_shape), the output as the input. Source: Ba, Kiros and Hinton 2016.
    """
    if not _takes("layer_norm", input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _layer_norm(input.contiguous(), weight, bias, math.prod(normalized_shape), eps)[0]


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight over the last ``len(normalized_shape)`` dimensions.

    Shapes, errors and results as ``torch.nn.functional.rms_norm``; eps None is that of float32, in which the
    statistics are computed. Source: Zhang and Sennrich 2019.
    """
    if not _takes("rms_norm", input, normalized_shape, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    return _rms_norm(input.contiguous(), weight, math.prod(normalized_shape), _eps(eps))[0]


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(s), s) of the sum s = input + residual, which the next residual connection takes.

    The same as the two steps of torch, s rounded to its dtype included; gradients flow through both outputs.
    input and residual have one shape (ValueError otherwise); the rest as ``layer_norm``.
    """
    input, residual = _addends("add_layer_norm", input, residual)
    if not _takes("add_layer_norm", input, normalized_shape, weight, bias, residual=residual):
        total = input + residual
        return F.layer_norm(total, normalized_shape, weight, bias, eps), total
    columns = math.prod(normalized_shape)
    return _add_layer_norm(input.contiguous(), residual.contiguous(), weight, bias, columns, eps)[:2]


def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) of the sum s = input + residual; as ``add_layer_norm``."""
    input, residual = _addends("add_rms_norm", input, residual)
    if not _takes("add_rms_norm", input, normalized_shape, weight, residual=residual):
        total = input + residual
        return F.rms_norm(total, normalized_shape, weight, eps), total
    columns = math.prod(normalized_shape)
    return _add_rms_norm(input.contiguous(), residual.contiguous(), weight, columns, _eps(eps))[:2]


def _eps(eps: float | None) -> float:
    return torch.finfo(torch.float32).eps if eps is None else eps


def _addends(name: str, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype of their sum."""
    if (
        isinstance(input, torch.Tensor)
        and isinstance(residual, torch.Tensor)
        and input.shape == residual.shape
        and input.dtype == residual.dtype
    ):
        return input, residual
    for label, value in (("input", input), ("residual", residual)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {label} must be a Tensor, not {type(value).__name__}")
    if input.shape != residual.shape:
        raise ValueError(
            f"{name}: input has shape {tuple(input.shape)} and residual {tuple(residual.shape)}; "
            "they must be the same (expand the smaller one first)"
        )
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


def _takes(
    name: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    *parameters: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> bool:
    """Whether the kernels run. Arguments that torch refuses are left to torch, whose errors say why."""
    if not isinstance(input, torch.Tensor) or is_small(name, input):
        return False
    if not isinstance(normalized_shape, tuple | list) or not normalized_shape:
        return False
    shape = input.shape[-len(normalized_shape) :]
    if shape != tuple(normalized_shape):
        return False
    dtype = None
    for value in parameters:
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            return False
        if name.endswith("layer_norm") and value.dtype not in (dtype or input.dtype, dtype or torch.float32):
            return False
        dtype = value.dtype
    return not not_taken(name, input, *parameters, residual) and input.numel() > 0


# --- registration --------------------------------------------------------------------------------

Pass = Callable[..., tuple[Any, ...]]
"""A backend's pass over the rows: ``cpu.forward``, ``cpu_backward.backward``, and the GPU's namesakes."""
_gpu_forward = imported_when_called("kernels.normalization.gpu:forward")
_gpu_backward = imported_when_called("kernels.normalization.gpu_backward:backward")


def _everything(backward: Pass) -> Pass:
    def run(*saved: Any) -> tuple[Any, ...]:
        *tensors, biased = saved
        return backward(*tensors, True, True, biased)

    return run


def _input_alone(backward: Pass) -> Callable[..., torch.Tensor]:
    return lambda *saved: backward(*saved, True, False, False)[0]


def _parameters_alone(backward: Pass) -> Pass:
    def run(
        grad: torch.Tensor, input: torch.Tensor, mean: Any, rstd: torch.Tensor, columns: int, biased: bool
    ) -> tuple[Any, ...]:
        return backward(grad, None, input, mean, rstd, None, columns, False, True, biased)[1:]

    return run


_SAVED = "Tensor input, Tensor? mean, Tensor rstd"
_norm_backward = register(
    f"norm_backward(Tensor grad, Tensor? grad_sum, {_SAVED}, Tensor? weight, int columns, bool biased)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_everything(cpu_backward.backward),
    cuda=_everything(_gpu_backward),
    fake=lambda grad, grad_sum, input, mean, rstd, weight, columns, biased: (
        torch.empty_like(input),
        rstd.new_empty(columns),
        rstd.new_empty(columns if biased else 0),
    ),
)
_norm_backward_input = register(
    f"norm_backward_input(Tensor grad, Tensor? grad_sum, {_SAVED}, Tensor? weight, int columns) -> Tensor",
    cpu=_input_alone(cpu_backward.backward),
    cuda=_input_alone(_gpu_backward),
    fake=lambda grad, grad_sum, input, mean, rstd, weight, columns: torch.empty_like(input),
)
_norm_backward_weight = register(
    f"norm_backward_weight(Tensor grad, {_SAVED}, int columns, bool biased) -> (Tensor, Tensor)",
    cpu=_parameters_alone(cpu_backward.backward),
    cuda=_parameters_alone(_gpu_backward),
    fake=lambda grad, input, mean, rstd, columns, biased: (
        rstd.new_empty(columns),
        rstd.new_empty(columns if biased else 0),
    ),
)


def _forward(forward: Pass, added: bool, centred: bool) -> Pass:
    """A backend's pass as one of the four: with a residual or without, with a mean or without."""

    def run(input: torch.Tensor, *arguments: Any) -> tuple[Any, ...]:
        *tensors, columns, eps = arguments
        residual = tensors.pop(0) if added else None
        weight, bias = tensors if centred else (*tensors, None)
        out, total, mean, rstd = forward(input, residual, weight, bias, columns, eps, centred)
        return (out, *[total] * added, *[mean] * centred, rstd)

    return run


def _register(name: str, added: bool, centred: bool) -> Any:
    """One of the four: (input, [residual], weight, [bias], columns, eps) -> (output, [sum], [mean], rstd)."""
    weight_at = 1 + added

    def fake(input: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        rows = input.numel() // arguments[-2]
        outputs = [torch.empty_like(input) for _ in range(1 + added)]
        return (*outputs, *(input.new_empty(rows, dtype=torch.float32) for _ in range(1 + centred)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        weight, ctx.columns = inputs[weight_at], inputs[-2]
        bias = inputs[weight_at + 1] if centred else None
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        mean = output[-2] if centred else None
        ctx.save_for_backward(output[1] if added else inputs[0], mean, output[-1], weight)
        ctx.mark_non_differentiable(*output[1 + added :])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor | None, ...]:
        input, mean, rstd, weight = ctx.saved_tensors
        grad_sum = others[0] if added else None
        grad_input = grad_weight = grad_bias = None
        needs = ctx.needs_input_grad
        needs_bias = centred and needs[weight_at + 1]
        if grad is None:
            grad_input = grad_sum
        else:
            grad = grad.contiguous()
            grad_sum = None if grad_sum is None else grad_sum.contiguous()
            columns = ctx.columns
            if not (needs[weight_at] or needs_bias):
                grad_input = _norm_backward_input(grad, grad_sum, input, mean, rstd, weight, columns)
            elif any(needs[:weight_at]):
                grad_input, grad_weight, grad_bias = _norm_backward(
                    grad, grad_sum, input, mean, rstd, weight, columns, needs_bias
                )
            else:
                grad_weight, grad_bias = _norm_backward_weight(grad, input, mean, rstd, columns, needs_bias)
        if grad_weight is not None:
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype) if needs[weight_at] else None
        if grad_bias is not None:
            grad_bias = grad_bias.view(ctx.bias_like[0]).to(ctx.bias_like[1]) if needs_bias else None
        parameters = (grad_weight, grad_bias) if centred else (grad_weight,)
        return (*(grad_input,) * weight_at, *parameters, None, None)

    arguments = f"Tensor input{', Tensor residual' * added}, Tensor? weight{', Tensor? bias' * centred}"
    results = ", ".join(["Tensor"] * (2 + added + centred))
    return register(
        f"{name}({arguments}, int columns, float eps) -> ({results})",
        cpu=_forward(cpu.forward, added, centred),
        cuda=_forward(_gpu_forward, added, centred),
        fake=fake,
        setup_context=setup_context,
        backward=backward,
    )


_layer_norm = _register("layer_norm", added=False, centred=True)
_rms_norm = _register("rms_norm", added=False, centred=False)
_add_layer_norm = _register("add_layer_norm", added=True, centred=True)
_add_rms_norm = _register("add_rms_norm", added=True, centred=False)
