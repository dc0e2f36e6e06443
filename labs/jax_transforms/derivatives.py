"""Jacobians and Hessians: which mode, and one program instead of a loop over basis vectors.

``jacobian``  of tanh(B tanh(A x)), few inputs and many outputs: one pass an input, or one an output
``hessian``   of a logistic regression's loss, sum softplus(A x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs
from labs.jax_transforms.arrays import random, to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.staging import Staged, waited
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.one_thread import OneThread
from labs.wording import us

JACOBIAN, HESSIAN = "jacobian", "hessian"
HIDDEN, ROWS = 128, 256  # hidden units of the first function; observations of the second
OPERATIONS = {"torch_jacfwd": 16, "torch_jacrev": 16, "torch_func": 96}
"""Under torch.func. A vector's product counts five (viewed as a matrix and back, two more to differentiate),
a tanh three; the Hessian's 7 operations forward and backward and 10 of softplus's second derivative, with
their tangents, are under two more layers than the constant.
"""
PASS_OPERATIONS = 6  # of one vector through either, backward
KERNELS = 8


def function_inputs(config: Config) -> tuple[Any, ...]:
    """(A (128, inputs), B (outputs, 128), x (inputs,)), float32."""
    first = random(31, (HIDDEN, config.inputs), scale=config.inputs**-0.5)
    second = random(32, (config.outputs, HIDDEN), scale=HIDDEN**-0.5)
    return (*first, *second, *random(33, (config.inputs,)))


def regression_inputs(config: Config) -> tuple[Any, ...]:
    """(A (256, parameters), x (parameters,)), float32."""
    return (
        *random(41, (ROWS, config.parameters), scale=config.parameters**-0.5),
        *random(42, (config.parameters,)),
    )


def jacobian_reference(config: Config, name: str) -> Any:
    import numpy as np

    first, second, x = (array.astype("float64") for array in function_inputs(config))
    middle = np.tanh(first @ x)
    slopes = 1 - np.tanh(second @ middle) ** 2
    return slopes[:, None] * ((second * (1 - middle**2)) @ first)


def hessian_reference(config: Config, name: str) -> Any:
    import numpy as np

    rows, x = (array.astype("float64") for array in regression_inputs(config))
    chance = 1 / (1 + np.exp(-(rows @ x)))
    return rows.T @ (rows * (chance * (1 - chance))[:, None])


def _jax_jacobian(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import jax.numpy as jnp

        first, second, x = to_jax(function_inputs(config))

        def function(x: Any, first: Any, second: Any) -> Any:
            return jnp.tanh(second @ jnp.tanh(first @ x))

        if name == "loop":
            row = jax.jit(lambda x, a, b, basis: jax.vjp(lambda x: function(x, a, b), x)[1](basis)[0])
            basis = list(jnp.eye(config.outputs))
            return waited(lambda: [row(x, first, second, each) for each in basis])
        mode = jax.jacfwd if name == "forward" else jax.jacrev
        return Staged(recorder, mode(function), x, first, second)

    return setup


def _jax_hessian(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import jax.numpy as jnp

        rows, x = to_jax(regression_inputs(config))

        def loss(x: Any, rows: Any) -> Any:
            return jax.nn.softplus(rows @ x).sum()

        if name == "loop":
            slope = jax.grad(loss)
            product = jax.jit(lambda x, rows, basis: jax.jvp(lambda x: slope(x, rows), (x,), (basis,))[1])
            basis = list(jnp.eye(config.parameters))
            return waited(lambda: [product(x, rows, each) for each in basis])
        outer = jax.jacfwd if name == "forward_over_reverse" else jax.jacrev
        return Staged(recorder, outer(jax.grad(loss)), x, rows)

    return setup


def _torch_jacobian(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        first, second, x = to_torch(function_inputs(config))

        def function(x: Any) -> Any:
            return torch.tanh(second @ torch.tanh(first @ x))

        if name != "torch_loop":
            mode = torch.func.jacfwd if name == "torch_jacfwd" else torch.func.jacrev
            whole = mode(function)
            return OneThread(lambda: whole(x))
        x.requires_grad_()
        basis = list(torch.eye(config.outputs))

        def loop() -> Any:
            out = function(x)
            return [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in basis]

        return OneThread(loop)

    return setup


def _torch_hessian(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        rows, x = to_torch(regression_inputs(config))
        whole = torch.func.hessian(lambda x: torch.nn.functional.softplus(rows @ x).sum())
        return OneThread(lambda: whole(x))

    return setup


def jacobian_flops(config: Config) -> dict[str, float]:
    """Of the products: a basis of ``inputs`` tangents forward, one of ``outputs`` cotangents backward."""
    small = 2.0 * HIDDEN * config.inputs
    large = 2.0 * HIDDEN * config.outputs
    return {"forward": config.inputs * (small + large), "reverse": config.outputs * (small + large)}


def hessian_flops(config: Config) -> float:
    """A tangent through ``A x`` and back through its transpose, for each parameter."""
    return config.parameters * 2 * 2.0 * ROWS * config.parameters


def variants(config: Config) -> Sequence[Variant]:
    found = [
        Variant(JACOBIAN, name, _jax_jacobian(name), threads=0) for name in ("forward", "reverse", "loop")
    ]
    found += [
        Variant(JACOBIAN, name, _torch_jacobian(name))
        for name in ("torch_jacfwd", "torch_jacrev", "torch_loop")
    ]
    found += [
        Variant(HESSIAN, name, _jax_hessian(name), threads=0)
        for name in ("forward_over_reverse", "reverse_over_reverse", "loop")
    ]
    return [*found, Variant(HESSIAN, "torch_func", _torch_hessian("torch_func"))]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    flops, hessian = jacobian_flops(config), hessian_flops(config)
    call = costs.jitted_call(machine, 2)
    # A pass of one vector, forward and backward: each matrix is read twice.
    numbers = {JACOBIAN: HIDDEN * (config.inputs + config.outputs), HESSIAN: 2 * ROWS * config.parameters}
    row = {
        group: costs.streamed_call(
            machine,
            2.5,
            costs.program(machine, 4.0 * count, 4, KERNELS)
            + 2.0 * costs.FLOAT * count / machine.bandwidth(costs.FLOAT * count),
        )
        for group, count in numbers.items()
    }
    function, wake = machine["torch_func_call_s"], machine["jax_wake_s"]
    product = "a product of thin matrices, far from the rate of the square one"
    dispatch = "how long the two threads of a call keep one another waiting"
    layers = "torch.func's Python, which depends on the operation and on what is nested"
    found = []

    def say(group: str, name: str, seconds: float, because: str, suspect: str) -> None:
        found.append(Prediction(f"{group}/{name}", "time_s", seconds, because, suspect))

    for name, passes in (("forward", config.inputs), ("reverse", config.outputs)):
        text = f"{passes} passes at once: {flops[name]:.3g} FLOPs"
        say(
            JACOBIAN,
            name,
            call + costs.program(machine, flops[name], 2, KERNELS),
            f"{text}, one call",
            product,
        )
        mode = "torch_jacfwd" if name == "forward" else "torch_jacrev"
        operations = OPERATIONS[mode]
        seconds = costs.torch_program(machine, flops[name], operations, "func", products=2, threads=1)
        say(JACOBIAN, mode, seconds, f"{text}, {operations} operations x {us(function)}", layers)
    say(
        JACOBIAN,
        "loop",
        config.outputs * row[JACOBIAN] + wake,
        f"{config.outputs} calls x {us(row[JACOBIAN])} + waking XLA's thread {us(wake)}",
        dispatch,
    )
    one = machine["torch_backward_s"] + PASS_OPERATIONS * machine["torch_recorded_call_s"]
    say(
        JACOBIAN,
        "torch_loop",
        config.outputs * one,
        f"{config.outputs} backward passes x {us(one)}",
        "starting autograd's engine once a pass",
    )
    seconds = call + costs.program(machine, hessian, 2, KERNELS)
    for name in ("forward_over_reverse", "reverse_over_reverse"):
        text = f"{config.parameters} passes at once: {hessian:.3g} FLOPs, one call"
        say(HESSIAN, name, seconds, text, product)
    text = f"{config.parameters} calls x {us(row[HESSIAN])} + waking XLA's thread {us(wake)}"
    say(HESSIAN, "loop", config.parameters * row[HESSIAN] + wake, text, dispatch)
    operations = OPERATIONS["torch_func"]
    seconds = costs.torch_program(machine, hessian, operations, "func", products=2, threads=1)
    say(HESSIAN, "torch_func", seconds, f"{operations} operations x {us(function)}", layers)
    return found
