"""Losses: cross entropy of logits, and of a linear layer whose logits never exist all at once.

Where a gradient is wanted and the loss is one number, the eager forward pass computes the gradient while
the logits are in cache and keeps it instead of them: logits and gradient cross memory once each. The backward
pass only scales, and only where the incoming gradient is not one. Elsewhere (``reduction="none"``, float16,
whose range needs the incoming gradient first, ``torch.compile``) the logits are kept and visited again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import _reduction

from kernels import functional as F
from kernels.loss import cpu
from kernels.loss.incoming import once, times_incoming
from kernels.op import register, use_torch, warn_once

_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-log softmax(input) at the target. Shapes, errors and results as ``torch.nn.functional.cross_entropy``.

    input: logits (rows, classes), (classes,), or (rows, classes, d1, ...) with the classes next to each other
    in memory (``logits.transpose(1, 2)``); float32, bfloat16 or float16; sums are float32. target: int64
    classes. Class weights, probabilities as targets and other layouts run torch's own. There is no second
    derivative.
    IndexError where a target is neither a class nor ``ignore_index``; on a GPU, where the host would have to
    wait to know, the loss and the gradient of such a row are NaN.
    """
    if use_torch("cross_entropy", input):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    reason = _reason(target, input.device, weight, reduction, label_smoothing)
    if reason is None:
        reason = _layout_reason(input, target)
    if reason is not None:
        _say("cross_entropy", reason)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    logits = (input.movedim(1, -1) if input.dim() > 2 else input).reshape(-1, classes).contiguous()
    labels = target.reshape(-1).contiguous()
    ahead = (
        reduction != "none"
        and logits.requires_grad
        and torch.is_grad_enabled()
        and logits.dtype is not torch.float16
        and not torch.compiler.is_compiling()
    )
    if ahead:
        loss, _ = _with_gradient(logits, labels, None, ignore_index, float(label_smoothing), reduction)
    else:
        loss = _cross_entropy(logits, labels, ignore_index, float(label_smoothing), reduction)
    if reduction == "none":
        loss = loss.view(target.shape)
    return _like_torchs(loss, input)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> torch.Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), the logits some rows at a time.

    Signature and results as ``torch.nn.functional.linear_cross_entropy`` (torch 2.13). input: (rows,
    features) or (features,). linear_weight: (classes, features). linear_bias: (classes,). target: int64
    classes, (rows,) or (). float32, bfloat16 or float16, sums in float32. Class weights, probabilities as
    targets, several dimensions of classes, and torch's own ``options`` run torch's. Errors as
    ``cross_entropy``. Held at once: some rows of logits, and the gradients, in float32. The matrix products
    are torch's, whose last bit may depend on the number of threads.
    """
    ignored = -100 if ignore_index is None else ignore_index
    reason: str | None = ""
    if not use_torch(
        "linear_cross_entropy", input, linear_weight, linear_bias, elements=_logits(input, linear_weight)
    ):
        if options is not None:
            reason = "the options are those of torch's own chunks"
        else:
            reason = _reason(target, input.device, weight, reduction, label_smoothing)
        if reason is None:
            reason = _linear_reason(input, linear_weight, target, linear_bias)
    if reason is not None:
        _say("linear_cross_entropy", reason)
        return _torchs_linear(
            input,
            linear_weight,
            target,
            linear_bias,
            options,
            weight=weight,
            ignore_index=ignored,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    device = input.device.type
    rows, matrix, bias = input.reshape(-1, input.shape[-1]), linear_weight, linear_bias
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, matrix, bias = rows.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
    rows, matrix = rows.contiguous(), matrix.contiguous()
    bias = None if bias is None else bias.contiguous()
    ahead = reduction != "none" and torch.is_grad_enabled()
    wanted = [ahead and tensor is not None and tensor.requires_grad for tensor in (rows, matrix, bias)]
    loss, *_ = _linear(
        rows,
        matrix,
        target.reshape(-1).contiguous(),
        bias,
        None,
        ignored,
        float(label_smoothing),
        reduction,
        *wanted,
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    return _like_torchs(loss, input)


def _logits(input: torch.Tensor, linear_weight: torch.Tensor) -> int:
    """Elements of the logits; of the input where the shapes are wrong, which torch then says."""
    features = input.shape[-1] if input.dim() else 0
    return input.numel() // features * linear_weight.shape[0] if features and linear_weight.dim() else 0


def _like_torchs(loss: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """The float32 loss in the dtype that torch would give; under autocast that is float32."""
    if input.dtype is torch.float32 or torch.is_autocast_enabled(input.device.type):
        return loss
    return loss.to(input.dtype)


# --- what torch does itself ----------------------------------------------------------------------


def _reason(
    target: torch.Tensor, device: torch.device, weight: Any, reduction: str, label_smoothing: float
) -> str | None:
    """None where the kernels serve, else why torch's own op does; "" where that needs no words.

    Torch's op also raises torch's errors: whatever looks wrong is left to it.
    """
    if weight is not None:
        return "there are no kernels for class weights"
    if target.is_floating_point():
        return "there are no kernels for probabilities as targets"
    wrong = target.dtype is not torch.int64 or target.device != device or reduction not in _REDUCTIONS
    return "" if wrong or not 0.0 <= label_smoothing <= 1.0 else None


def _layout_reason(input: torch.Tensor, target: torch.Tensor) -> str | None:
    """As ``_reason``, for the shapes of ``cross_entropy``."""
    if input.dim() < 2:
        return None if input.dim() == 1 and input.shape[0] and not target.dim() else ""
    if target.shape != (input.shape[0], *input.shape[2:]) or not input.shape[1]:
        return ""
    if input.dim() > 2 and not input.movedim(1, -1).is_contiguous():
        return "there are no kernels for classes that do not lie next to each other in memory"
    return None


def _linear_reason(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None
) -> str | None:
    """As ``_reason``, for the shapes of ``linear_cross_entropy``."""
    if linear_weight.dim() > 2:
        return "there are no kernels for several dimensions of classes"
    if input.dim() not in (1, 2) or linear_weight.dim() != 2 or target.shape != input.shape[:-1]:
        return ""
    parts = [linear_weight] if linear_bias is None else [linear_weight, linear_bias]
    mixed = any(part.dtype is not input.dtype for part in parts)
    if mixed and not torch.is_autocast_enabled(input.device.type):
        return ""
    classes, features = linear_weight.shape
    fits = features == input.shape[-1] and (linear_bias is None or linear_bias.shape == (classes,))
    return None if fits and classes else ""


def _say(name: str, reason: str) -> None:
    if reason and not torch.compiler.is_compiling():
        warn_once(name, reason)


def _torchs_linear(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None,
    options: Any,
    **rest: Any,
) -> torch.Tensor:
    """Torch's own, or before torch 2.13 what it stands for."""
    if F.linear_cross_entropy is not None:
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, options=options, **rest
        )
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **rest)


# --- registration --------------------------------------------------------------------------------


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, target, *ctx.options = inputs
    ctx.save_for_backward(input, target)


def _visit_again(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    input, target = ctx.saved_tensors
    return once(_with_gradient(input, target, grad, *ctx.options)[1]), None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _scale_kept(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    (kept,) = ctx.saved_tensors
    gradient = None if grad is None else times_incoming(kept, grad, ctx.dtype)
    return gradient, None, None, None, None, None


def _loss_like(input: torch.Tensor, reduction: str) -> torch.Tensor:
    return input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=torch.float32)


_with_gradient = register(
    "cross_entropy_with_gradient(Tensor input, Tensor target, Tensor? grad, SymInt ignore_index, "
    "float label_smoothing, str reduction) -> (Tensor, Tensor)",
    cpu=cpu.cross_entropy_with_gradient,
    cuda="kernels.loss.gpu:cross_entropy_with_gradient",
    fake=lambda input, target, grad, ignore_index, label_smoothing, reduction: (
        _loss_like(input, reduction),
        torch.empty_like(input),
    ),
    setup_context=_keep_gradient,
    backward=_scale_kept,
)
_cross_entropy = register(
    "cross_entropy(Tensor input, Tensor target, SymInt ignore_index, float label_smoothing, str reduction)"
    " -> Tensor",
    cpu=cpu.cross_entropy,
    cuda="kernels.loss.gpu:cross_entropy",
    fake=lambda input, target, ignore_index, label_smoothing, reduction: _loss_like(input, reduction),
    setup_context=_keep_inputs,
    backward=_visit_again,
)


def _linear_fake(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None,
    grad: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    *wanted: bool,
) -> tuple[torch.Tensor, ...]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    gradients = [
        input.new_empty(shape if want else (0,), dtype=torch.float32)
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    return _loss_like(input, reduction), *gradients


def _linear_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, linear_weight, target, linear_bias, _, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options, ctx.dtype = options[:3], input.dtype
    ctx.ahead = any(options[3:])
    if ctx.ahead:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(input, linear_weight, target, linear_bias)


def _linear_backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    wanted = (needs[0], needs[1], needs[3])
    if grad is None:
        return (None,) * 11
    if ctx.ahead:
        gradients = [
            times_incoming(kept, grad, ctx.dtype) if want else None
            for kept, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
    else:
        input, linear_weight, target, linear_bias = ctx.saved_tensors
        found = _linear(input, linear_weight, target, linear_bias, grad, *ctx.options, *wanted)[1:]
        gradients = [
            once(made.to(ctx.dtype)) if want else None for made, want in zip(found, wanted, strict=True)
        ]
    return gradients[0], gradients[1], None, gradients[2], *((None,) * 7)


_linear = register(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? grad, SymInt ignore_index, float label_smoothing, str reduction, bool input_gradient, "
    "bool weight_gradient, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.linear_cross_entropy,
    cuda="kernels.loss.gpu:linear_cross_entropy",
    fake=_linear_fake,
    setup_context=_linear_keep,
    backward=_linear_backward,
)
