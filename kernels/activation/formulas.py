"""Functions of one element, each declared once: its value and its gradient, as formulas.

The formulas are ordinary Python over a namespace that a backend supplies: ``exp_nonpositive`` (e**x for x <=
0), ``where`` and ``abs``. ``translate`` reads them into that namespace: compiled by numba
(cpu_elementwise.py), by Triton (gpu_elementwise.py), or over torch's float64 (the tests' gradcheck).
Everything else is arithmetic here, so no backend needs a library of mathematics (numba has none that
vectorises; Triton's fails in its interpreter).

Every exponential that is used is of a number that is not positive: nothing overflows. ``where`` computes
both its sides and takes one, so that no branch is needed.
A gradient takes the incoming gradient and what the forward pass keeps: its input, or its output where the
derivative is a function of that. NaN and infinities come out as from torch's own functions.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

# The names that a backend defines; here they only stand for themselves.
exp_nonpositive: Any = None
where: Any = None


def sigmoid(x):
    decay = exp_nonpositive(-abs(x))
    return where(x > 0.0, 1.0, decay) / (1.0 + decay)


def sigmoid_gradient(grad, output):
    return grad * (1.0 - output) * output


def tanh(x):
    """Below 0.625 x + x**3 p(x**2), p of degree 4 (4e-9); above 1 - 2 d / (1 + d), d = e**-2|x|; x's sign."""
    z = x * x
    p = -0.00570498 * z + 0.02063908
    p = p * z + -0.05373971
    p = p * z + 0.13331442
    p = p * z + -0.33333282
    d = exp_nonpositive(-2.0 * abs(x))
    far = 1.0 - 2.0 * d / (1.0 + d)
    return where(abs(x) < 0.625, x + x * (z * p), where(x < 0.0, -far, far))


def tanh_gradient(grad, output):
    return grad * (1.0 - output * output)


def relu(x):
    return where(x < 0.0, 0.0, x)


def relu_gradient(grad, output):
    return where(output <= 0.0, 0.0, grad)


def leaky_relu(x, negative_slope):
    return where(x > 0.0, x, x * negative_slope)


def leaky_relu_gradient(grad, x, negative_slope):
    return where(x > 0.0, grad, grad * negative_slope)


def expm1_nonpositive(x):
    """e**x - 1 for x <= 0 without cancellation: above -0.5 x + x**2 p(x), p of degree 4 (relative error
    1.4e-9).
    """
    p = 0.0011282321 * x + 0.0081961257
    p = p * x + 0.0416332446
    p = p * x + 0.1666630954
    p = p * x + 0.4999998808
    return where(x > -0.5, x + x * x * p, exp_nonpositive(x) - 1.0)


def elu(x, alpha):
    return where(x < 0.0, alpha * expm1_nonpositive(x), x)


def elu_gradient(grad, x, alpha):
    return where(x > 0.0, grad, grad * alpha * exp_nonpositive(x))


def softplus(x, beta, threshold):
    """ln(1 + e**v) / beta with v = beta x, and x itself where v > threshold.

    ln(1 + e**v) = max(v, 0) + ln(1 + u), u = e**-|v|; ln(1 + u) = 2 artanh(s), s = u / (2 + u) <= 1/3, whose
    odd series is cut to degree 9 and fitted (relative error 4.5e-9).
    """
    v = beta * x
    u = exp_nonpositive(-abs(v))
    s = u / (2.0 + u)
    z = s * s
    p = 0.1401222944 * z + 0.1399957091
    p = p * z + 0.2001084983
    p = p * z + 0.3333320618
    return where(v > threshold, x, (where(v > 0.0, v, 0.0) + 2.0 * (s + s * z * p)) / beta)


def softplus_gradient(grad, x, beta, threshold):
    v = beta * x
    return where(v > threshold, grad, grad * sigmoid(v))


def silu(x):
    return x * sigmoid(x)


def silu_gradient(grad, x):
    s = sigmoid(x)
    return grad * (s * (1.0 + x * (1.0 - s)))


def normal_cdf(x):
    """Probability that a standard normal variable is below x; absolute error below 1e-7 in float32.

    Below zero e**q(|x|), q of degree 8 fitted to the logarithm with the weight that the error has in the
    probability (1.5e-8). q falls for ever, to -inf at infinity, so that no range has to be cut.
    """
    t = abs(x)
    q = -1.5285310155e-6 * t + 2.2308282496e-5
    q = q * t + -1.0664022843e-4
    q = q * t + -1.4558862313e-4
    q = q * t + 4.9571720883e-3
    q = q * t + -3.6426201463e-2
    q = q * t + -0.3182872832
    q = q * t + -0.7978866696
    q = q * t + -0.6931471229
    tail = exp_nonpositive(q)
    return where(x > 0.0, 1.0 - tail, tail)


def gelu(x):
    """x Phi(x) (Hendrycks and Gimpel 2016)."""
    return x * normal_cdf(x)


def gelu_gradient(grad, x):
    return grad * (normal_cdf(x) + x * (0.3989422804 * exp_nonpositive(-0.5 * x * x)))


def gelu_tanh(x):
    """x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    return x * sigmoid(x * (1.5957691216 + 0.0713548163 * x * x))


def gelu_tanh_gradient(grad, x):
    s = sigmoid(x * (1.5957691216 + 0.0713548163 * x * x))
    return grad * (s + x * (s * (1.0 - s)) * (1.5957691216 + 0.2140644488 * x * x))


@dataclass(frozen=True)
class Elementwise:
    """One member of the family: ``value(x, *parameters)`` and ``gradient(grad, kept, *parameters)``.

    parameters: names of the scalars, as torch's function calls them. keeps_output: ``kept`` is the output,
    which the next layer keeps anyway; else it is the input.
    """

    name: str
    value: Callable[..., Any]
    gradient: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    keeps_output: bool = False


FAMILY = {
    member.name: member
    for member in (
        Elementwise("gelu", gelu, gelu_gradient),
        Elementwise("gelu_tanh", gelu_tanh, gelu_tanh_gradient),
        Elementwise("silu", silu, silu_gradient),
        Elementwise("sigmoid", sigmoid, sigmoid_gradient, keeps_output=True),
        Elementwise("tanh", tanh, tanh_gradient, keeps_output=True),
        Elementwise("relu", relu, relu_gradient, keeps_output=True),
        Elementwise("leaky_relu", leaky_relu, leaky_relu_gradient, ("negative_slope",)),
        Elementwise("softplus", softplus, softplus_gradient, ("beta", "threshold")),
        Elementwise("elu", elu, elu_gradient, ("alpha",)),
    )
}

_FORMULAS = [item for item in list(globals().values()) if isinstance(item, FunctionType)]


def translate(
    names: dict[str, Any], compile_formula: Callable[[FunctionType], Any], number: type = float
) -> dict[str, Any]:
    """Every formula by name, over the backend's names and compiled by it.

    names: ``exp_nonpositive``, ``where``, ``abs``. number: the type of the constants (a bare 0.5 is a
    float64 to numba and would take the whole loop with it).
    """
    space = {"__builtins__": builtins, **names}
    for formula in _FORMULAS:
        constants = tuple(number(c) if isinstance(c, float) else c for c in formula.__code__.co_consts)
        copy = FunctionType(formula.__code__.replace(co_consts=constants), space, formula.__name__)
        copy.__module__, copy.__doc__ = formula.__module__, formula.__doc__
        space[formula.__name__] = compile_formula(copy)
    return space
