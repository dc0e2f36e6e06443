"""What are features of JAX?

Answer. Functions that take functions. ``jit`` compiles a function once for each shape and removes Python from
the call; ``grad`` adds some two more forward passes; ``vmap`` turns a loop of calls into one call on a batch;
``scan`` compiles one step of a loop and not all; ``checkpoint`` trades memory for a forward pass, where XLA
lets it; donation reuses memory; ``shard_map`` cuts work over devices, and the cut decides the collectives.
All ask for pure functions: what Python does while JAX traces happens once.

Formulas (``costs.py``, and ``predict`` in each problem's file):
  call       call + arrays x cost of an array + waking XLA's thread, from 1000 FLOPs on
  loop       turns x call; vmap: one call + FLOPs / rate + bytes / bandwidth
  gradient   3 x forward's FLOPs, less the gradient of the data; under checkpoint 4 x (in a scan)
  scan       steps x (FLOPs / rate + kernels x start of a kernel)
  compile    a program + kernels x cost of a kernel: constant for scan, proportional to steps unrolled
  Jacobian   one pass an input (forward mode) or an output (reverse mode), all in one product
  traces     one for each shape;  collectives: one for each sum that is cut

Sources: Bradbury et al., JAX: composable transformations of Python+NumPy programs, 2018; JAX documentation:
"Sharp bits", "Ahead-of-time lowering and compilation", "Buffer donation", "shard_map"; Griewank and Walther
2008, "Evaluating Derivatives", sections 3.2 and 4.6 (cost of a gradient); Chen et al. 2016, "Training Deep
Nets with Sublinear Memory Cost"; Pearlmutter 1994, "Fast Exact Multiplication by the Hessian".
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.jax_transforms import (
    batched,
    derivatives,
    dispatch,
    misuse,
    networks,
    recurrent,
    retracing,
    sample_gradients,
    sharding,
    softmax,
    training,
)
from labs.jax_transforms.claims import CLAIMS
from labs.jax_transforms.config import Config
from labs.jax_transforms.figures import figure
from labs.jax_transforms.proof import check
from labs.lab import Lab, Prediction, Variant
from labs.machine import Machine

__all__ = ["LAB", "Config"]

PREDICTED = (
    dispatch,
    batched,
    sample_gradients,
    training,
    recurrent,
    derivatives,
    softmax,
    retracing,
    sharding,
)


def variants(config: Config) -> Sequence[Variant]:
    return [variant for part in (*PREDICTED, misuse) for variant in part.variants(config)]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    return [prediction for part in PREDICTED for prediction in part.predict(config, machine)]


def memory_bytes(config: Config) -> float:
    """Of the largest group, beside the libraries: groups run one after the other, the ways of one together.

    A way holds its inputs twice (NumPy's and its framework's) and its output; the float64 reference is twice
    as large, and holds what it went through.
    """
    each, trained = sample_gradients.sizes(config), training.sizes(config)
    states = config.steps * recurrent.BATCH * config.hidden
    groups = (
        40.0 * config.samples * networks.number_of_parameters(each),
        140.0 * networks.number_of_parameters(trained) + 50.0 * config.batch * sum(trained),
        150.0 * states + 400.0 * config.hidden**2,
        60.0 * config.products * batched.SIZE**2,
        60.0 * (config.outputs + derivatives.HIDDEN) * (config.outputs + config.inputs),
        60.0 * config.parameters * (config.parameters + derivatives.ROWS),
        60.0 * config.side**2,
    )
    return max(groups) + 2.0**30


LAB = Lab(
    name="jax_transforms",
    question="What are features of JAX?",
    answer=(
        "Functions that take functions: jit compiles once for each shape, grad costs about two more forward "
        "passes, vmap turns a loop of calls into one call, scan compiles one step of a loop, checkpoint "
        "trades memory for computing again, donation reuses memory and shard_map cuts work over devices. "
        "They compose, and ask in return for pure functions: what Python does while JAX traces happens once."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    columns=("tuned",),  # pages that come anew with each large output would pass for what a library costs
    seconds=10.0,
    sources=(
        "Bradbury et al.: JAX, composable transformations of Python+NumPy programs, 2018",
        "JAX documentation: Sharp bits; Ahead-of-time lowering; Buffer donation; shard_map",
        "Griewank, Walther: Evaluating Derivatives, 2008, sections 3.2 and 4.6",
        "Chen et al.: Training Deep Nets with Sublinear Memory Cost, 2016",
        "Pearlmutter: Fast Exact Multiplication by the Hessian, 1994",
    ),
)
