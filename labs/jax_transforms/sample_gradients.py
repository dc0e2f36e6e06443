"""The gradient of every sample: a loop, or ``vmap`` of ``grad``, which turns vectors into matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs, networks
from labs.jax_transforms.arrays import leaves, to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.staging import Staged, waited
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.one_thread import OneThread
from labs.programming_models.torch_ways import compiled_first
from labs.vectorization.rungs import missing_compiler
from labs.wording import us

GROUP, LAYERS = "sample_gradients", 2
# A vector's product counts five (viewed as a matrix and back, two products backward), its sum one, tanh one,
# the loss four.
OPERATIONS = 24
PRODUCTS = 3 * (LAYERS + 1) - 1  # forward, and two backward but for the gradient of the data
KERNELS = 24  # of the compiled gradient


def sizes(config: Config) -> list[int]:
    return networks.widths(config.features, LAYERS)


def reference(config: Config, name: str) -> Any:
    """Each sample by itself, float64, leaf by leaf."""
    weights = [array.astype("float64") for array in networks.parameters(sizes(config))]
    inputs, targets = (array.astype("float64") for array in networks.batch(sizes(config), config.samples))
    each = [
        tuple(networks.gradient(weights, inputs[place, None], targets[place, None])[1])
        for place in range(config.samples)
    ]
    return tuple(leaves(each))


def _jax(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import jax.numpy as jnp

        weights = to_jax(networks.parameters(sizes(config)))
        inputs, targets = to_jax(networks.batch(sizes(config), config.samples))

        def one(weights: Any, x: Any, y: Any) -> Any:
            return networks.loss(jnp.tanh, weights, x, y)

        if name == "loop":
            gradient = jax.jit(jax.grad(one))
            pairs = list(zip(inputs, targets, strict=True))
            return waited(lambda: [gradient(weights, x, y) for x, y in pairs])
        return Staged(recorder, jax.vmap(jax.grad(one), (None, 0, 0)), weights, inputs, targets)

    return setup


def _torch(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        weights = to_torch(networks.parameters(sizes(config)))
        inputs, targets = to_torch(networks.batch(sizes(config), config.samples))

        def one(weights: Any, x: Any, y: Any) -> Any:
            return networks.loss(torch.tanh, weights, x, y)

        every = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
        if name == "torch_func":
            return OneThread(lambda: every(weights, inputs, targets))
        if name == "torch_func_compiled":
            compiled = torch.compile(every, dynamic=False)
            return OneThread(compiled_first(lambda: compiled(weights, inputs, targets)))
        leaves_of = tuple(weight.requires_grad_() for weight in weights)
        pairs = list(zip(inputs, targets, strict=True))
        return OneThread(lambda: [torch.autograd.grad(one(leaves_of, x, y), leaves_of) for x, y in pairs])

    return setup


def variants(config: Config) -> Sequence[Variant]:
    flops = networks.gradient_flops(sizes(config), config.samples)
    found = [Variant(GROUP, name, _jax(name), flops, threads=0) for name in ("loop", "vmap")]
    found += [Variant(GROUP, name, _torch(name), flops) for name in ("torch_loop", "torch_func")]
    if config.compile:
        lacking = missing_compiler()
        name = "torch_func_compiled"
        found.append(Variant(GROUP, name, _torch(name), flops, unavailable=lacking))
    return found


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    samples = config.samples
    flops = networks.gradient_flops(sizes(config), samples)
    weights = costs.FLOAT * networks.number_of_parameters(sizes(config))
    call = costs.jitted_call(machine, 2 * (LAYERS + 1) + 1)
    # One sample's products are a matrix times a vector and an outer product: bytes, not FLOPs.
    alone = 3 * weights / machine.bandwidth(2 * weights) + KERNELS * machine["jax_kernel_s"]
    each = costs.streamed_call(machine, 2 * (LAYERS + 1) + 1, alone)
    written = samples * weights
    # Batched outer products and products of vectors: XLA has no kernel but the plain loop.
    plain = flops / machine["scalar_float32_flops"]
    together = plain + 3 * written / machine.bandwidth(2 * written) + KERNELS * machine["jax_kernel_s"]
    gradient, function = machine["torch_recorded_call_s"], machine["torch_func_call_s"]
    started = machine["torch_backward_s"]
    said = {
        "loop": (
            samples * each + machine["jax_wake_s"],
            f"{samples} calls in a row x {us(each)}; inside, {KERNELS} kernels and {3 * weights:.3g} B "
            f"{us(alone)}",
            "dispatch of a program with so many arrays in and out",
        ),
        "vmap": (
            call + together,
            f"one call {us(call)}, {flops:.3g} FLOPs as scalar code {us(plain)}, {written:.3g} B of "
            "gradients, moved once more",
            "XLA's batched products of vectors, and how often it copies their results into another order",
        ),
        "torch_loop": (
            samples * (started + OPERATIONS * gradient + 3 * weights / machine.bandwidth(2 * weights)),
            f"{samples} x (starting backward {us(started)} + {OPERATIONS} operations with their gradients x "
            f"{us(gradient)})",
            "products cost more than the functions of one number that the constant comes from",
        ),
        "torch_func": (
            costs.torch_program(
                machine, flops, OPERATIONS, "func", 2.0 * written, products=PRODUCTS, threads=1
            ),
            f"{OPERATIONS} operations under vmap(grad) x {us(function)}, {written:.3g} B of gradients",
            "torch.func's layers cost per operation and per transformation",
        ),
    }
    if config.compile:
        entry, product = machine["torch_compiled_call_s"], machine["torch_product_call_s"]
        said["torch_func_compiled"] = (
            entry + PRODUCTS * product + plain + 2 * written / machine.bandwidth(2 * written),
            f"a compiled call {us(entry)} + {PRODUCTS} batched products x {us(product)}, {flops:.3g} FLOPs "
            f"as scalar code {us(plain)}, {written:.3g} B of gradients",
            "batched products of vectors, which are no library's strength",
        )
    return [Prediction(f"{GROUP}/{name}", "time_s", *item) for name, item in said.items()]
