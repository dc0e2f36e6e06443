"""Matrix products with small numbers: linear layers of int8 and int4 weights, and bfloat16 matrices.

Weights are quantised symmetrically (zero is zero): by output row to int8, by groups of a row to int4.
Activations stay as they are, so the only error is that of the weights, at most half a step each.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.matmul import cpu_bfloat16, cpu_linear, cpu_quantize, reference
from kernels.op import FLOATS, register, use_torch, warn_once

_TAKEN = (*FLOATS, torch.int8, torch.uint8)


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- quantising ----------------------------------------------------------------------------------


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{name}: weight is {_name(weight.dtype)}; it must be a floating-point tensor")
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight has shape {_shape(weight)}; it must be (out_features, in_features)")


def _check_finite(name: str, scale: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and not scale.isfinite().all():
        row = int((~scale.isfinite()).reshape(len(scale), -1).any(1).nonzero()[0])
        raise ValueError(
            f"{name}: row {row} of weight holds an infinity or a NaN, which no scale can represent"
        )


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight_int8, scale): weight is about weight_int8 * scale[:, None], to half a scale at most.

    weight: (out, in) float32, bfloat16 or float16, as ``torch.nn.Linear`` has it. weight_int8: (out, in),
    -127 to 127. scale: (out,) float32, the row's largest magnitude / 127; 0 for a row of zeros. Rounded to
    nearest, ties to even. Not differentiable. TypeError when weight is not floating-point; ValueError when it
    is not a matrix or (outside ``torch.compile``) not finite.
    """
    _check_weight("quantize_int8", weight)
    weight = weight.detach()
    if use_torch("quantize_int8", weight):
        integers, scale = reference.quantize_int8(weight)
    else:
        integers, scale = _quantize_int8(weight.contiguous())
    _check_finite("quantize_int8", scale)
    return integers, scale


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight_int4, scale): each ``group_size`` weights of a row share a scale; error at most half of it.

    weight: (out, in) as for ``quantize_int8``. group_size: a multiple of 32 that divides in. weight_int4:
    (out, in / 2) uint8, two integers q + 8 in a byte, q from -7 to 7 (symmetric: no zero point): byte j of a
    group holds the group's j-th weight in its lower and the (j + group_size / 2)-th in its upper half. scale:
    (out, in / group_size) float32, the group's largest magnitude / 7.
    """
    _check_weight("quantize_int4", weight)
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"quantize_int4: group_size is a {type(group_size).__name__}; it must be an int")
    if group_size < 32 or group_size % 32 or weight.shape[1] % group_size:
        raise ValueError(
            f"quantize_int4: group_size={group_size} must be a multiple of 32 that divides "
            f"in_features={weight.shape[1]}"
        )
    weight = weight.detach()
    if use_torch("quantize_int4", weight):
        packed, scale = reference.quantize_int4(weight, group_size)
    else:
        packed, scale = _quantize_int4(weight.contiguous(), group_size)
    _check_finite("quantize_int4", scale)
    return packed, scale


def _fake_quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)


def _fake_quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    packed = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
    return packed, weight.new_empty((rows, columns // group_size), dtype=torch.float32)


_quantize_int8 = register(
    "quantize_int8(Tensor weight) -> (Tensor, Tensor)",
    cpu=cpu_quantize.quantize_int8,
    cuda="kernels.matmul.gpu_quantize:quantize_int8",
    fake=_fake_quantize_int8,
)
_quantize_int4 = register(
    "quantize_int4(Tensor weight, int group_size) -> (Tensor, Tensor)",
    cpu=cpu_quantize.quantize_int4,
    cuda="kernels.matmul.gpu_quantize:quantize_int4",
    fake=_fake_quantize_int4,
)


# --- linear layers -------------------------------------------------------------------------------


def _check_linear(
    name: str, bits: int, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any
) -> None:
    """Raise what is wrong with these arguments; called after the cheap test of all of them has failed."""
    if not input.is_floating_point():
        raise TypeError(f"{name}: input is {_name(input.dtype)}; it must be a floating-point tensor")
    wanted = torch.int8 if bits == 8 else torch.uint8
    if weight.dtype is not wanted:
        raise TypeError(
            f"{name}: the weight is {_name(weight.dtype)}; quantize_int{bits} makes it {_name(wanted)}"
        )
    if scale.dtype is not torch.float32:
        raise TypeError(f"{name}: scale is {_name(scale.dtype)}; it must be float32")
    if weight.dim() != 2:
        raise ValueError(f"{name}: the weight has shape {_shape(weight)}; it must have two dimensions")
    rows, in_features = weight.shape[0], weight.shape[1] * (8 // bits)
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"{name}: input of shape {_shape(input)} does not fit a weight of {in_features} in_features"
        )
    if bits == 8:
        if scale.shape != (rows,):
            raise ValueError(
                f"{name}: scale has shape {_shape(scale)}; it must be ({rows},), one a weight row"
            )
    elif scale.dim() != 2 or len(scale) != rows:
        raise ValueError(
            f"{name}: scale has shape {_shape(scale)}; it must be ({rows}, in_features / group_size)"
        )
    elif in_features and (scale.shape[1] == 0 or in_features % (32 * scale.shape[1])):
        raise ValueError(
            f"{name}: scale has {scale.shape[1]} groups a row, which do not cut {in_features} "
            "in_features into groups of a multiple of 32"
        )
    if bias is not None:
        if bias.shape != (rows,):
            raise ValueError(f"{name}: bias has shape {_shape(bias)}; it must be ({rows},)")
        if bias.dtype is not input.dtype:
            raise TypeError(
                f"{name}: bias is {_name(bias.dtype)}, input {_name(input.dtype)}; they must agree"
            )


def linear_int8(
    input: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``torch.nn.functional.linear`` with the weight weight_int8 * scale[:, None], which is never written
    out.

    input: (..., in) float32, bfloat16 or float16. weight_int8, scale: of ``quantize_int8``. bias: (out,) of
    the input's dtype. Result: (..., out) of the input's dtype, from float32 sums. Differentiable in input and
    bias; the weight takes no gradient. ValueError and TypeError say which shape or dtype does not fit.
    """
    _check_linear("linear_int8", 8, input, weight_int8, scale, bias)
    if use_torch("linear_int8", weight_int8, input, scale, bias, dtypes=_TAKEN):
        return reference.linear_int8(input, weight_int8, scale, bias)
    return _linear_int8(*(None if t is None else t.contiguous() for t in (input, weight_int8, scale, bias)))


def linear_int4(
    input: torch.Tensor, weight_int4: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same with the weight of ``quantize_int4``. The size of a group follows from scale's shape."""
    _check_linear("linear_int4", 4, input, weight_int4, scale, bias)
    if use_torch("linear_int4", weight_int4, input, scale, bias, dtypes=_TAKEN):
        return reference.linear_int4(input, weight_int4, scale, bias)
    return _linear_int4(*(None if t is None else t.contiguous() for t in (input, weight_int4, scale, bias)))


def _register_linear(bits: int) -> Any:
    name = f"linear_int{bits}"

    def fake(input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    def fake_backward(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return grad.new_empty((*grad.shape[:-1], weight.shape[1] * (8 // bits)))

    grad_input = register(
        f"{name}_backward(Tensor grad, Tensor weight, Tensor scale) -> Tensor",
        cpu=getattr(cpu_linear, f"{name}_backward"),
        cuda=f"kernels.matmul.gpu_linear:{name}_backward",
        fake=fake_backward,
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        for_input = grad_input(grad.contiguous(), weight, scale) if ctx.needs_input_grad[0] else None
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return for_input, None, None, for_bias

    return register(
        f"{name}(Tensor input, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
        cpu=getattr(cpu_linear, name),
        cuda=f"kernels.matmul.gpu_linear:{name}",
        fake=fake,
        setup_context=keep,
        backward=backward,
    )


_linear_int8 = _register_linear(8)
_linear_int4 = _register_linear(4)


# --- bfloat16 matrices ---------------------------------------------------------------------------


def matmul_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of bfloat16 with float32 sums, rounded to bfloat16 once; differentiable.

    a: (..., m, k) or (k,); b: (k, n). On a CPU: AMX tiles, else AVX-512 VDPBF16PS, else torch's own product,
    as on a GPU (cuBLAS). A transposed view of a contiguous matrix is read as it lies. TypeError for another
    dtype, ValueError for shapes that do not fit.
    """
    if a.dtype is not torch.bfloat16 or b.dtype is not torch.bfloat16:
        raise TypeError(f"matmul_bf16: a is {_name(a.dtype)} and b {_name(b.dtype)}; both must be bfloat16")
    if a.dim() == 0 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"matmul_bf16: a {_shape(a)} and b {_shape(b)} do not fit; they must be (..., k) and (k, n)"
        )
    if use_torch("matmul_bf16", a, b, dtypes=(torch.bfloat16,)):
        return a @ b
    if a.device.type != "cpu":
        warn_once("matmul_bf16", "the kernel is the CPU's")
        return a @ b
    rows = a if a.dim() == 2 else a.reshape(-1, a.shape[-1])
    return _matmul(rows, b).view(*a.shape[:-1], b.shape[1])


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    left, transpose_a = _as_it_lies(a)
    right, transpose_b = _as_it_lies(b)
    return _matmul_bf16(left, right, transpose_a, transpose_b)


def _as_it_lies(matrix: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(contiguous matrix, whether it is the transpose of the one given)."""
    if not matrix.is_contiguous() and matrix.t().is_contiguous():
        return matrix.t(), True
    return matrix.contiguous(), False


def _fake_matmul(a: torch.Tensor, b: torch.Tensor, transpose_a: bool, transpose_b: bool) -> torch.Tensor:
    return a.new_empty((a.shape[int(transpose_a)], b.shape[int(not transpose_b)]))


def _keep_matmul(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, ctx.transpose_a, ctx.transpose_b = inputs
    ctx.save_for_backward(a, b)


def _matmul_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    left, right = a.t() if ctx.transpose_a else a, b.t() if ctx.transpose_b else b
    for_a = for_b = None
    if ctx.needs_input_grad[0]:
        for_a = _matmul(right, grad.t()) if ctx.transpose_a else _matmul(grad, right.t())
    if ctx.needs_input_grad[1]:
        for_b = _matmul(grad.t(), left) if ctx.transpose_b else _matmul(left.t(), grad)
    return for_a, for_b, None, None


_matmul_bf16 = register(
    "matmul_bf16(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor",
    cpu=cpu_bfloat16.matmul_bf16,
    fake=_fake_matmul,
    setup_context=_keep_matmul,
    backward=_matmul_backward,
)
