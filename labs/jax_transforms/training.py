"""A training step of an MLP: what the gradient costs beside the forward pass, what ``jit``, donation and
``checkpoint`` change; eager torch and torch.compile beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs, networks
from labs.jax_transforms.arrays import to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.excerpts import CHECKPOINT, DONATED, PLAIN
from labs.jax_transforms.staging import Staged, waited
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.programming_models.torch_ways import compiled_first
from labs.vectorization.rungs import missing_compiler
from labs.wording import us
from labs.xla import EAGER_GRADIENT

GROUP, LAYERS = "training_step", 3
PRODUCTS = {"forward": LAYERS + 1, "step": 3 * (LAYERS + 1)}
OPERATIONS = 23  # a layer's product counts three (two more backward), its sum and its tanh one, the loss four
UPDATE = 2  # JAX's operations for each parameter: the product with the rate and the subtraction
KERNELS = {"forward": 10, "step": 32}
FORWARD, GRADIENT = "forward", "gradient"


def sizes(config: Config) -> list[int]:
    return networks.widths(config.width, LAYERS)


def reference(config: Config, name: str) -> Any:
    """The loss, with its gradients, or with the parameters after one step, float64."""
    weights = [array.astype("float64") for array in networks.parameters(sizes(config))]
    inputs, targets = (array.astype("float64") for array in networks.batch(sizes(config), config.batch))
    loss, slopes = networks.gradient(weights, inputs, targets)
    if name == FORWARD:
        return loss
    if name == GRADIENT:
        return (loss, *slopes)
    moved = (weight - networks.RATE * slope for weight, slope in zip(weights, slopes, strict=True))
    return (loss, *moved)


def jax_loss(checkpoint: bool = False) -> Callable[..., Any]:
    """``loss(weights, inputs, targets)``; with ``checkpoint`` each layer is computed again in backward."""
    import jax
    import jax.numpy as jnp

    if not checkpoint:
        return lambda weights, x, y: networks.loss(jnp.tanh, weights, x, y)

    def loss(weights: Any, x: Any, y: Any) -> Any:
        layer = jax.checkpoint(lambda x, weight, bias: jnp.tanh(x @ weight + bias))
        for place in range(0, len(weights) - 2, 2):
            x = layer(x, weights[place], weights[place + 1])
        return ((x @ weights[-2] + weights[-1] - y) ** 2).mean()

    return loss


def jax_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    """(weights, inputs, targets) -> (loss, new weights) by gradient descent."""
    import jax

    def step(weights: Any, x: Any, y: Any) -> Any:
        value, slopes = jax.value_and_grad(loss)(weights, x, y)
        return value, jax.tree.map(lambda weight, slope: weight - networks.RATE * slope, weights, slopes)

    return step


def _jax(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax

        weights = to_jax(networks.parameters(sizes(config)))
        inputs, targets = to_jax(networks.batch(sizes(config), config.batch))
        function = jax_step(jax_loss(name == "checkpoint"))
        if name == "eager":
            return waited(lambda: function(weights, inputs, targets))
        if name in (FORWARD, GRADIENT):
            function = jax_loss() if name == FORWARD else jax.value_and_grad(jax_loss())
        if name != "donated":
            shown = {"step": PLAIN, "checkpoint": CHECKPOINT}.get(name)
            return Staged(recorder, function, weights, inputs, targets, excerpt=shown)
        # Each call gets the parameters that the last one made; the old ones are gone.
        return Staged(
            recorder,
            function,
            weights,
            inputs,
            targets,
            carry=lambda output, given: (output[1], *given[1:]),
            excerpt=DONATED,
            donate_argnums=0,
        )

    return setup


def _torch(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        weights = tuple(each.requires_grad_() for each in to_torch(networks.parameters(sizes(config))))
        inputs, targets = to_torch(networks.batch(sizes(config), config.batch))

        def loss(weights: Any, x: Any, y: Any) -> Any:
            return networks.loss(torch.tanh, weights, x, y)

        function = torch.compile(loss, dynamic=False) if name == "torch_compile" else loss

        def step() -> Any:
            value = function(weights, inputs, targets)
            slopes = torch.autograd.grad(value, weights)
            with torch.no_grad():
                return (value, *torch._foreach_add(weights, slopes, alpha=-networks.RATE))

        return compiled_first(step) if name == "torch_compile" else step

    return setup


def variants(config: Config) -> Sequence[Variant]:
    forward = networks.product_flops(sizes(config), config.batch)
    whole = networks.gradient_flops(sizes(config), config.batch)
    found = [
        Variant(GROUP, name, _jax(name), forward if name == FORWARD else whole, threads=0)
        for name in ("step", FORWARD, GRADIENT, "donated", "checkpoint", "eager")
    ]
    found.append(Variant(GROUP, "torch", _torch("torch"), whole, threads=0))
    if config.compile:
        lacking = missing_compiler()
        found.append(
            Variant(GROUP, "torch_compile", _torch("torch_compile"), whole, threads=0, unavailable=lacking)
        )
    return found


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    forward = networks.product_flops(sizes(config), config.batch)
    whole = networks.gradient_flops(sizes(config), config.batch)
    weights = float(costs.FLOAT * networks.number_of_parameters(sizes(config)))
    leaves = 2 * (LAYERS + 1)
    update = 4 * weights  # a weight and its gradient are read, both have been or are written
    rate = machine["jax_matmul_flops"] / 1e9
    torch_rate = machine.product_rate(whole / PRODUCTS["step"], threads=0) / 1e9
    step = costs.jitted_call(machine, leaves + 1) + costs.program(
        machine, whole, PRODUCTS["step"], KERNELS["step"], update
    )
    because = (
        f"{whole:.3g} FLOPs at {rate:.0f} GFLOP/s, {KERNELS['step']} kernels, {update:.3g} B of the update"
    )
    suspect = "products of other shapes than the square one that the rate comes from"
    operations = EAGER_GRADIENT * 4 * (LAYERS + 1)  # product, sum and tanh of a layer, four of the loss
    eager = operations * machine["jax_recorded_call_s"] + UPDATE * leaves * machine["jax_eager_call_s"]
    gradient = machine["torch_recorded_call_s"]
    plain = leaves * machine["torch_call_s"]  # torch._foreach_add: a kernel for each parameter, one call
    products = PRODUCTS["step"]
    torch_step = (
        costs.torch_program(machine, whole, OPERATIONS, "recorded", update, products=products) + plain
    )
    entry = machine["torch_compiled_gradient_s"] + (leaves + 1) * machine["torch_compiled_array_s"]
    compiled = entry + plain
    compiled += costs.torch_program(machine, whole, products, "", update, products=products)
    said = {
        "step": (step, because, suspect),
        FORWARD: (
            costs.jitted_call(machine, leaves / 2 + 1)
            + costs.program(machine, forward, PRODUCTS[FORWARD], KERNELS[FORWARD]),
            f"{forward:.3g} FLOPs at {rate:.0f} GFLOP/s, {KERNELS[FORWARD]} kernels",
            suspect,
        ),
        GRADIENT: (
            step - update / machine.bandwidth(update, threads=0),
            f"{whole:.3g} FLOPs at {rate:.0f} GFLOP/s, {KERNELS['step']} kernels, no update",
            suspect,
        ),
        "donated": (step, because, suspect),
        "checkpoint": (
            step,
            f"{because}; XLA for CPUs drops the barriers and computes no product twice",
            suspect,
        ),
        "eager": (
            eager + machine["jax_wake_s"] + costs.product_seconds(machine, whole, PRODUCTS["step"]),
            f"{operations} operations with eager gradients x {us(machine['jax_recorded_call_s'])}, "
            f"{UPDATE * leaves} of the update, {whole:.3g} FLOPs",
            "Python in JAX's tracer, which runs at every call and depends on the operation",
        ),
        "torch": (
            torch_step,
            f"{OPERATIONS} operations with gradients x {us(gradient)}, {whole:.3g} FLOPs at "
            f"{torch_rate:.0f} GFLOP/s",
            "threads of torch and of JAX in one process, which wait spinning for one another's cores",
        ),
    }
    if config.compile:
        said["torch_compile"] = (
            compiled,
            f"a compiled call of {leaves + 2} arrays and its gradient {us(entry)} + "
            f"{PRODUCTS['step']} products, {whole:.3g} FLOPs at {torch_rate:.0f} GFLOP/s",
            "threads of torch and of JAX in one process, which wait spinning for one another's cores",
        )
    found = [Prediction(f"{GROUP}/{name}", "time_s", *item) for name, item in said.items()]
    return [
        *found,
        Prediction(f"{GROUP}/{FORWARD}", "xla_FLOP", forward, "2 x batch x weights"),
        Prediction(f"{GROUP}/step", "xla_FLOP", whole, "3 x forward, less the gradient of the data"),
        Prediction(
            f"{GROUP}/donated", "reused_B", weights, "every parameter is updated in place", exact=True
        ),
        Prediction(f"{GROUP}/step", "reused_B", 0.0, "nothing was donated", exact=True),
    ]
