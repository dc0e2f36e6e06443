"""The rules of the optimizers as the papers have them: new values of one tensor, right in float64.

``step`` is the number of this update, 1 at first. Each function returns the parameter and then the state, in
the order of its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _gradient(param: Tensor, grad: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    """The gradient to descend, with that of weight_decay / 2 * |param|**2."""
    return (-grad if maximize else grad) + (weight_decay * param if weight_decay else 0.0)


def sgd(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    step: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", section 2.

    In torch's form: the velocity is not scaled by the learning rate, and starts as the first gradient.
    """
    grad = _gradient(param, grad, weight_decay, maximize)
    if momentum:
        buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
        grad = grad + momentum * buffer if nesterov else buffer
    return param - lr * grad, buffer


def adagrad(
    param: Tensor,
    grad: Tensor,
    total: Tensor,
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Duchi, Hazan and Singer 2011, "Adaptive subgradient methods", section 1.1 with a diagonal matrix."""
    grad = _gradient(param, grad, weight_decay, maximize)
    total = total + grad**2
    return param - lr / (1 + (step - 1) * lr_decay) * grad / (total.sqrt() + eps), total


def rmsprop(
    param: Tensor,
    grad: Tensor,
    square: Tensor,
    mean: Tensor | None,
    buffer: Tensor | None,
    *,
    step: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tieleman and Hinton 2012, lecture 6e; where ``mean`` is given Graves 2013, equations 38 to 45."""
    grad = _gradient(param, grad, weight_decay, maximize)
    square = alpha * square + (1 - alpha) * grad**2
    variance = square
    if mean is not None:
        mean = alpha * mean + (1 - alpha) * grad
        variance = square - mean**2
    change = grad / (variance.sqrt() + eps)
    if buffer is not None:
        change = buffer = momentum * buffer + change
    return param - lr * change, square, mean, buffer


def adadelta(
    param: Tensor,
    grad: Tensor,
    square: Tensor,
    changes: Tensor,
    *,
    step: int,
    lr: float,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeiler 2012, "ADADELTA: an adaptive learning rate method", algorithm 1."""
    grad = _gradient(param, grad, weight_decay, maximize)
    square = rho * square + (1 - rho) * grad**2
    change = (changes + eps).sqrt() / (square + eps).sqrt() * grad
    return param - lr * change, square, rho * changes + (1 - rho) * change**2


def adam(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    largest: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Kingma and Ba 2015, algorithm 1.

    decoupled_weight_decay: AdamW, Loshchilov and Hutter 2019, algorithm 2. Where ``largest`` is given:
    AMSGrad, Reddi, Kale and Kumar 2018, in torch's form, which corrects the bias of the largest.
    """
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    grad = _gradient(param, grad, 0.0 if decoupled_weight_decay else weight_decay, maximize)
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad**2
    scale = square
    if largest is not None:
        scale = largest = torch.maximum(largest, square)
    root = (scale / (1 - beta2**step)).sqrt() + eps
    return param - lr / (1 - beta1**step) * mean / root, mean, square, largest
