"""The optimizers' rules on the CPU: one loop a rule, each element read once and written once.

Arithmetic is float32 (float64 for float64 tensors) and what is stored is rounded once; torch's loop over
single tensors rounds 16-bit tensors after each of its operations. Formulas: ``reference.py``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from kernels.optimizer.cpu_lists import distinct, launch, number, over_lists, update_rule
from kernels.optimizer.lists import Tensors
from kernels.simd import full_width
from kernels.storage import narrow, widen


@njit(error_model="numpy", fastmath={"contract"}, forceinline=True)
def _between(start, end, weight):
    """``start + weight * (end - start)`` as torch.lerp has it, infinities included."""
    change = end - start
    return start + weight * change if weight < 0.5 else end - change * (np.float32(1) - weight)


@update_rule
def _sgd(param, grad, buffer, second, third, step, numbers):
    full_width(), distinct()
    sign, decay = number(numbers[0], param), number(numbers[1], param)
    rate, momentum = number(numbers[2], param), number(numbers[3], param)
    undamped, nesterov, first = number(1.0 - numbers[4], param), numbers[5] != 0.0, numbers[6] != 0.0
    for i in range(len(param)):
        value, slope = widen(param[i]), sign * widen(grad[i])
        if decay != 0.0:
            slope += decay * value
        if buffer is not None:
            velocity = slope if first else momentum * widen(buffer[i]) + undamped * slope
            buffer[i] = narrow(velocity, buffer)
            slope = slope + momentum * velocity if nesterov else velocity
        param[i] = narrow(value - rate * slope, param)


@update_rule
def _adagrad(param, grad, total, second, third, step, numbers):
    full_width(), distinct()
    sign, decay, eps = number(numbers[0], param), number(numbers[1], param), number(numbers[4], param)
    rate = number(numbers[2] / (1.0 + (step - 1.0) * numbers[3]), param)
    for i in range(len(param)):
        value, slope = widen(param[i]), sign * widen(grad[i])
        if decay != 0.0:
            slope += decay * value
        squares = widen(total[i]) + slope * slope
        total[i] = narrow(squares, total)
        param[i] = narrow(value - rate * slope / (np.sqrt(squares) + eps), param)


@update_rule
def _rmsprop(param, grad, square, mean, buffer, step, numbers):
    full_width(), distinct()
    sign, decay, eps = number(numbers[0], param), number(numbers[1], param), number(numbers[4], param)
    rate, momentum = number(numbers[2], param), number(numbers[5], param)
    alpha, rest = number(numbers[3], param), number(1.0 - numbers[3], param)
    for i in range(len(param)):
        value, slope = widen(param[i]), sign * widen(grad[i])
        if decay != 0.0:
            slope += decay * value
        variance = alpha * widen(square[i]) + rest * slope * slope
        square[i] = narrow(variance, square)
        if mean is not None:
            average = _between(widen(mean[i]), slope, rest)
            mean[i] = narrow(average, mean)
            variance -= average * average
        root = np.sqrt(variance) + eps
        if buffer is not None:
            velocity = momentum * widen(buffer[i]) + slope / root
            buffer[i] = narrow(velocity, buffer)
            param[i] = narrow(value - rate * velocity, param)
        else:
            param[i] = narrow(value - rate * slope / root, param)


@update_rule
def _adadelta(param, grad, square, changes, third, step, numbers):
    full_width(), distinct()
    sign, decay, eps = number(numbers[0], param), number(numbers[1], param), number(numbers[4], param)
    rate, rho, rest = number(numbers[2], param), number(numbers[3], param), number(1.0 - numbers[3], param)
    for i in range(len(param)):
        value, slope = widen(param[i]), sign * widen(grad[i])
        if decay != 0.0:
            slope += decay * value
        squares, moved = rho * widen(square[i]) + rest * slope * slope, widen(changes[i])
        square[i] = narrow(squares, square)
        change = np.sqrt(moved + eps) / np.sqrt(squares + eps) * slope
        changes[i] = narrow(rho * moved + rest * change * change, changes)
        param[i] = narrow(value - rate * change, param)


@update_rule
def _adam(param, grad, mean, square, largest, step, numbers):
    full_width(), distinct()
    sign, decay, eps = number(numbers[0], param), number(numbers[1], param), number(numbers[5], param)
    beta1, beta2 = numbers[3], numbers[4]
    rate = number(numbers[2] / (1.0 - beta1**step), param)
    correction = number(1.0 / math.sqrt(1.0 - beta2**step), param)
    kept = number(1.0 - numbers[6], param)
    rest1, rest2, beta2 = number(1.0 - beta1, param), number(1.0 - beta2, param), number(beta2, param)
    for i in range(len(param)):
        value, slope = kept * widen(param[i]), sign * widen(grad[i])
        if decay != 0.0:
            slope += decay * value
        average = _between(widen(mean[i]), slope, rest1)
        squares = beta2 * widen(square[i]) + rest2 * slope * slope
        mean[i] = narrow(average, mean)
        square[i] = narrow(squares, square)
        if largest is not None:
            before = widen(largest[i])
            squares = before if before >= squares or before != before else squares
            largest[i] = narrow(squares, largest)
        param[i] = narrow(value - rate * average / (np.sqrt(squares) * correction + eps), param)


# --- the operations, as kernels/optimizer/operations.py registers them ---------------------------

_SGD, _ADAGRAD, _RMSPROP, _ADADELTA, _ADAM = map(over_lists, (_sgd, _adagrad, _rmsprop, _adadelta, _adam))


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


def sgd_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    lr: torch.Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    numbers = (_sign(maximize), weight_decay, lr.item(), momentum, dampening, nesterov, first)
    launch(_SGD, params, grads, (momentum_buffers, (), ()), (), numbers)


def adagrad_(
    params: Tensors,
    grads: Tensors,
    state_sums: Tensors,
    state_steps: Tensors,
    lr: torch.Tensor,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    numbers = (_sign(maximize), weight_decay, lr.item(), lr_decay, eps)
    launch(_ADAGRAD, params, grads, (state_sums, (), ()), state_steps, numbers)


def rmsprop_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    grad_avgs: Tensors,
    momentum_buffers: Tensors,
    state_steps: Tensors,
    lr: torch.Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
) -> None:
    numbers = (_sign(maximize), weight_decay, lr.item(), alpha, eps, momentum)
    launch(_RMSPROP, params, grads, (square_avgs, grad_avgs, momentum_buffers), state_steps, numbers)


def adadelta_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    acc_deltas: Tensors,
    state_steps: Tensors,
    lr: torch.Tensor,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    numbers = (_sign(maximize), weight_decay, lr.item(), rho, eps)
    launch(_ADADELTA, params, grads, (square_avgs, acc_deltas, ()), state_steps, numbers)


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    state_steps: Tensors,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    rate = lr.item()
    coupled, shrink = (0.0, rate * weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    numbers = (_sign(maximize), coupled, rate, beta1, beta2, eps, shrink)
    launch(_ADAM, params, grads, (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), state_steps, numbers)
