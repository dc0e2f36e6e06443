"""The optimizers' rules on the GPU (Triton): one launch for a list of tensors.

A program updates one block of one tensor. It finds which from a table in device memory: the first block of
each tensor, their sizes and addresses. Hyperparameters stand in device memory too, so that no value of them
compiles a kernel anew and a learning rate that lives on the device is never waited for. Formulas:
``reference.py``.

Blocks that lie whole within their tensor are loaded without a mask, 16 bytes a thread where all addresses are
multiples of 16; the last block of each tensor is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.optimizer.lists import (
    Tensors,
    address_of,
    check_device,
    check_equal,
    copy_back,
    counted,
    elements_of,
    one_layout,
)

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

# Rows of the table behind the first blocks and the sizes.
_PARAM, _GRAD, _FIRST, _SECOND, _THIRD = (tl.constexpr(row) for row in range(2, 7))


# --- inside the kernels --------------------------------------------------------------------------


@triton.jit
def _place(table, tensors, TENSORS: tl.constexpr):
    """(which tensor this program works on, which block of it, its number of elements)."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TENSORS)
    first = tl.load(table + index, mask=index < tensors, other=1 << 62)
    which = tl.sum((first <= program).to(tl.int32), axis=0) - 1
    return which, program - tl.load(table + which), tl.load(table + tensors + which)


@triton.jit
def _pointers(table, row: tl.constexpr, tensors, which, like, offsets, ALIGNED: tl.constexpr):
    """Pointers to the elements at ``offsets`` of a tensor of the element type of ``like``."""
    pointers = tl.load(table + row * tensors + which).to(like.dtype) + offsets
    if ALIGNED:  # said of the result: Triton forgets what it knew of an integer that becomes a pointer
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr, NUMBER: tl.constexpr):
    values = tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)
    return values.to(NUMBER)


@triton.jit
def _store(pointers, values, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def _number(numbers, index, NUMBER: tl.constexpr):
    return tl.load(numbers + index).to(NUMBER)


@triton.jit
def _descent(value, slope, numbers, NUMBER: tl.constexpr):
    """The gradient with its sign and that of the weight decay."""
    slope *= _number(numbers, 0, NUMBER)
    decay = _number(numbers, 1, NUMBER)
    return tl.where(decay != 0.0, slope + decay * value, slope)


@triton.jit
def _between(start, end, weight):
    """``start + weight * (end - start)`` as torch.lerp has it, infinities included."""
    change = end - start
    return tl.where(weight < 0.5, start + weight * change, end - change * (1.0 - weight))


@triton.jit
def sgd_rule(
    param, grad, buffer, second, third, numbers, factors, tensors, which, rate, mask,
    MASKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    value = _load(param, mask, MASKED, NUMBER)
    slope = _descent(value, _load(grad, mask, MASKED, NUMBER), numbers, NUMBER)
    if buffer is not None:
        momentum, undamped = _number(numbers, 2, NUMBER), _number(numbers, 3, NUMBER)
        velocity = momentum * _load(buffer, mask, MASKED, NUMBER) + undamped * slope
        velocity = tl.where(_number(numbers, 5, NUMBER) != 0.0, slope, velocity)  # the first step
        _store(buffer, velocity, mask, MASKED)
        slope = tl.where(
            _number(numbers, 4, NUMBER) != 0.0, slope + momentum * velocity, velocity
        )  # Nesterov
    _store(param, value - rate * slope, mask, MASKED)


@triton.jit
def adagrad_rule(
    param, grad, total, second, third, numbers, factors, tensors, which, rate, mask,
    MASKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    value = _load(param, mask, MASKED, NUMBER)
    slope = _descent(value, _load(grad, mask, MASKED, NUMBER), numbers, NUMBER)
    squares = _load(total, mask, MASKED, NUMBER) + slope * slope
    _store(total, squares, mask, MASKED)
    rate *= _number(factors, which, NUMBER)
    root = tl.sqrt(squares) + _number(numbers, 2, NUMBER)
    _store(param, value - rate * slope / root, mask, MASKED)


@triton.jit
def rmsprop_rule(
    param, grad, square, mean, buffer, numbers, factors, tensors, which, rate, mask,
    MASKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    alpha, rest = _number(numbers, 2, NUMBER), _number(numbers, 3, NUMBER)
    value = _load(param, mask, MASKED, NUMBER)
    slope = _descent(value, _load(grad, mask, MASKED, NUMBER), numbers, NUMBER)
    variance = alpha * _load(square, mask, MASKED, NUMBER) + rest * slope * slope
    _store(square, variance, mask, MASKED)
    if mean is not None:
        average = _between(_load(mean, mask, MASKED, NUMBER), slope, rest)
        _store(mean, average, mask, MASKED)
        variance -= average * average
    root = tl.sqrt(variance) + _number(numbers, 4, NUMBER)
    if buffer is not None:
        momentum = _number(numbers, 5, NUMBER)
        velocity = momentum * _load(buffer, mask, MASKED, NUMBER) + slope / root
        _store(buffer, velocity, mask, MASKED)
        _store(param, value - rate * velocity, mask, MASKED)
    else:
        _store(param, value - rate * slope / root, mask, MASKED)


@triton.jit
def adadelta_rule(
    param, grad, square, changes, third, numbers, factors, tensors, which, rate, mask,
    MASKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    rho, rest, eps = _number(numbers, 2, NUMBER), _number(numbers, 3, NUMBER), _number(numbers, 4, NUMBER)
    value = _load(param, mask, MASKED, NUMBER)
    slope = _descent(value, _load(grad, mask, MASKED, NUMBER), numbers, NUMBER)
    squares = rho * _load(square, mask, MASKED, NUMBER) + rest * slope * slope
    moved = _load(changes, mask, MASKED, NUMBER)
    _store(square, squares, mask, MASKED)
    change = tl.sqrt(moved + eps) / tl.sqrt(squares + eps) * slope
    _store(changes, rho * moved + rest * change * change, mask, MASKED)
    _store(param, value - rate * change, mask, MASKED)


@triton.jit
def adam_rule(
    param, grad, mean, square, largest, numbers, factors, tensors, which, rate, mask,
    MASKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    beta2, rest2 = _number(numbers, 3, NUMBER), _number(numbers, 4, NUMBER)
    kept = 1.0 - rate * _number(numbers, 6, NUMBER)
    value = kept * _load(param, mask, MASKED, NUMBER)
    slope = _descent(value, _load(grad, mask, MASKED, NUMBER), numbers, NUMBER)
    average = _between(_load(mean, mask, MASKED, NUMBER), slope, _number(numbers, 2, NUMBER))
    squares = beta2 * _load(square, mask, MASKED, NUMBER) + rest2 * slope * slope
    _store(mean, average, mask, MASKED)
    _store(square, squares, mask, MASKED)
    if largest is not None:
        before = _load(largest, mask, MASKED, NUMBER)
        squares = tl.where((before >= squares) | (before != before), before, squares)
        _store(largest, squares, mask, MASKED)
    rate *= _number(factors, which, NUMBER)
    root = tl.sqrt(squares) * _number(factors, tensors + which, NUMBER) + _number(numbers, 5, NUMBER)
    _store(param, value - rate * average / root, mask, MASKED)


@triton.jit
def update(
    table, tensors, numbers, factors, rate, param, grad, first, second, third,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, NUMBER: tl.constexpr, TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor by ``RULE``.

    table: int64 (7, tensors): first blocks, sizes, addresses of parameters, gradients and three states.
    numbers: float64 hyperparameters. factors: float64 (any, tensors), what depends on the step. rate: the
    learning rate. param, grad, first, second, third: tensors that say the element types; None where the rule
    has no such state. NUMBER: type of the arithmetic. TENSORS: a power of two, at least ``tensors``.
    """
    which, block, size = _place(table, tensors, TENSORS)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    p = _pointers(table, _PARAM, tensors, which, param, offsets, ALIGNED)
    g = _pointers(table, _GRAD, tensors, which, grad, offsets, ALIGNED)
    a, b, c = None, None, None
    if first is not None:
        a = _pointers(table, _FIRST, tensors, which, first, offsets, ALIGNED)
    if second is not None:
        b = _pointers(table, _SECOND, tensors, which, second, offsets, ALIGNED)
    if third is not None:
        c = _pointers(table, _THIRD, tensors, which, third, offsets, ALIGNED)
    lr = _number(rate, 0, NUMBER)
    inside = offsets < size
    if (block + 1) * BLOCK <= size:
        RULE(p, g, a, b, c, numbers, factors, tensors, which, lr, inside, False, NUMBER)
    else:
        RULE(p, g, a, b, c, numbers, factors, tensors, which, lr, inside, True, NUMBER)


# --- the launch ----------------------------------------------------------------------------------


def configuration(tensors: int, number: Any = tl.float32) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options): 8 elements a thread, that is two loads of 16 bytes of float32, one of 16 bits."""
    return {
        "BLOCK": 1024,
        "TENSORS": max(16, triton.next_power_of_2(tensors)),
        "NUMBER": number,
    }, {"num_warps": 4}


def _on(device: torch.device, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of 64-bit elements on ``device``, in one transfer."""
    if device.type == "cpu":
        return list(parts)
    starts = [0, *accumulate(-(-part.numel() // 2) * 2 for part in parts)]  # 16-byte boundaries
    words = torch.empty(starts[-1], dtype=torch.int64, pin_memory=True)
    for start, part in zip(starts, parts, strict=False):
        words[start : start + part.numel()] = part.view(torch.int64).view(-1)
    words = words.to(device, non_blocking=True)
    return [
        words[start : start + part.numel()].view(part.dtype)
        for start, part in zip(starts, parts, strict=False)
    ]


def _launch(
    rule: Any,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    steps: Tensors,
    lr: torch.Tensor,
    numbers: Sequence[float],
    factors: Any = None,
) -> None:
    """As ``cpu_lists.launch``. factors(steps) -> (any, tensors): what depends on the step."""
    check_equal(params, grads, states, steps)
    check_device(params, grads, states)
    device = params[0].device
    scales = torch.zeros(1, dtype=torch.float64)
    if steps:
        count = counted(steps)
        if factors is not None:
            scales = factors(count)
    lists, copies = one_layout(params, grads, states)
    constants, options = configuration(
        len(params), tl.float64 if params[0].dtype is torch.float64 else tl.float32
    )
    sizes = list(map(elements_of, params))
    blocks = [0, *accumulate(-(-size // constants["BLOCK"]) for size in sizes)]
    addresses = [list(map(address_of, tensors)) or [0] * len(params) for tensors in lists]
    if blocks[-1]:
        table = torch.tensor([blocks[:-1], sizes, *addresses], dtype=torch.int64)
        values = torch.tensor([*numbers, 0.0 if lr.device == device else lr.item()], dtype=torch.float64)
        moved = _on(device, table, values, *([scales] if scales.device != device else []))
        update[(blocks[-1],)](
            moved[0],
            len(params),
            moved[1],
            moved[-1] if scales.device != device else scales,
            lr if lr.device == device else moved[1][len(numbers) :],
            *(tensors[0] if tensors else None for tensors in lists),
            RULE=rule,
            ALIGNED=all(address % 16 == 0 for address in chain(*addresses)),
            **constants,
            **options,
        )
    copy_back(copies)
    torch.autograd.graph.increment_version(chain(params, *states, steps))


# --- the operations, as kernels/optimizer/operations.py registers them ---------------------------


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


def sgd_(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov, maximize, first):
    numbers = (_sign(maximize), weight_decay, momentum, 1 - dampening, nesterov, first)
    _launch(sgd_rule, params, grads, (momentum_buffers, (), ()), (), lr, numbers)


def adagrad_(params, grads, state_sums, state_steps, lr, lr_decay, weight_decay, eps, maximize):
    numbers = (_sign(maximize), weight_decay, eps)
    states = (state_sums, (), ())
    _launch(
        adagrad_rule, params, grads, states, state_steps, lr, numbers, lambda t: 1 / (1 + (t - 1) * lr_decay)
    )


def rmsprop_(
    params, grads, square_avgs, grad_avgs, momentum_buffers, state_steps,
    lr, alpha, eps, weight_decay, momentum, maximize,
):  # fmt: skip
    numbers = (_sign(maximize), weight_decay, alpha, 1 - alpha, eps, momentum)
    _launch(rmsprop_rule, params, grads, (square_avgs, grad_avgs, momentum_buffers), state_steps, lr, numbers)


def adadelta_(params, grads, square_avgs, acc_deltas, state_steps, lr, rho, eps, weight_decay, maximize):
    numbers = (_sign(maximize), weight_decay, rho, 1 - rho, eps)
    _launch(adadelta_rule, params, grads, (square_avgs, acc_deltas, ()), state_steps, lr, numbers)


def adam_(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
    lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize,
):  # fmt: skip
    coupled, shrink = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    numbers = (_sign(maximize), coupled, 1 - beta1, beta2, 1 - beta2, eps, shrink)
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    _launch(
        adam_rule, params, grads, states, state_steps, lr, numbers,
        lambda t: torch.stack([1 / (1 - beta1**t), (1 - beta2**t).rsqrt()]),
    )  # fmt: skip


def compilations() -> list[Compilation]:
    """The shipped kernels for a model of some 150 tensors."""
    from kernels.ahead_of_time import Compilation

    constants, options = configuration(150)
    rules = {
        "SGD": (sgd_rule, 1),
        "Adagrad": (adagrad_rule, 1),
        "RMSprop": (rmsprop_rule, 3),
        "Adadelta": (adadelta_rule, 2),
        "Adam": (adam_rule, 3),
        "AdamW": (adam_rule, 2),
    }
    found = []
    for operation, (rule, count) in rules.items():
        for element in ("bf16", "fp32"):
            types = {
                "table": "*i64!",
                "tensors": "i32",
                "numbers": "*fp64!",
                "factors": "*fp64!",
                "rate": "*fp64",
            }
            states = dict(zip(("first", "second", "third"), [f"*{element}!"] * count, strict=False))
            absent = {name: None for name in ("first", "second", "third") if name not in states}
            types |= {"param": f"*{element}!", "grad": f"*{element}!", **states}
            found.append(
                Compilation(
                    label=f"{operation} {element}",
                    kernel=update,
                    types=types,
                    constants={**constants, **absent, "RULE": rule, "ALIGNED": True},
                    options=options,
                    operation=operation,
                    direction="forward",
                    matrix=False,
                )
            )
    return found
