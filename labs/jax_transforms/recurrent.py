"""A recurrent network: ``scan`` compiles one step, a Python loop under ``jit`` compiles every step.

The gradient keeps every state; ``checkpoint`` of the body keeps the carried ones only and computes the rest
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs
from labs.jax_transforms.arrays import random, to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.excerpts import LOOPS
from labs.jax_transforms.staging import Staged, waited
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.one_thread import OneThread
from labs.wording import us

GROUP, GRADIENT = "recurrent", "recurrent_gradient"
BATCH, UNROLL = 16, 8
OPERATIONS = 4  # of a step in JAX: two products, their sum, tanh
TORCH = {"": 7, "gradient": 9, "kept": 5}
"""In torch, of a step: forward (a product counts two, and a row is cut out), with its gradient (a product
counts three), and tensors that are kept.
"""
KERNELS = {"scan": 6, "scan_unroll_8": 5, "unrolled": 4}  # started a step
KERNELS_OF_PROGRAM = {"scan": 6, "scan_unroll_8": UNROLL + 6}  # that differ: XLA compiles equal ones once
COMPILATIONS = 5  # of each forward program, whose time to compile is claimed about
GRADIENT_KERNELS = 18  # started a step of forward and backward


def inputs(config: Config) -> tuple[Any, ...]:
    """(inputs (steps, 16, hidden), first state (16, hidden), two (hidden, hidden) weights), float32."""
    hidden = config.hidden
    sequence, state = random(21, (config.steps, BATCH, hidden), (BATCH, hidden))
    weights = random(22, (hidden, hidden), (hidden, hidden), scale=0.7 * hidden**-0.5)
    return (sequence, state, *weights)


def reference(config: Config, name: str) -> Any:
    """The last state, float64."""
    return _states(config)[-1]


def gradient_reference(config: Config, name: str) -> Any:
    """Gradients of both weights of the last state's mean square, by hand, float64."""
    import numpy as np

    sequence, _, recurrent, incoming = (array.astype("float64") for array in inputs(config))
    states = _states(config)
    flowing = 2 * states[-1] / states[-1].size
    slopes = [np.zeros_like(recurrent), np.zeros_like(incoming)]
    for turn in reversed(range(config.steps)):
        flowing = flowing * (1 - states[turn + 1] ** 2)
        slopes[0] += states[turn].T @ flowing
        slopes[1] += sequence[turn].T @ flowing
        flowing = flowing @ recurrent.T
    return tuple(slopes)


def _states(config: Config) -> list[Any]:
    import numpy as np

    sequence, state, recurrent, incoming = (array.astype("float64") for array in inputs(config))
    states = [state]
    for row in sequence:
        states.append(np.tanh(states[-1] @ recurrent + row @ incoming))
    return states


def last_state(name: str, steps: int) -> Callable[..., Any]:
    """The function that is staged: by ``scan``, or by a loop that Python unrolls while tracing."""
    import jax
    import jax.numpy as jnp

    def step(state: Any, row: Any, recurrent: Any, incoming: Any) -> Any:
        return jnp.tanh(state @ recurrent + row @ incoming)

    if name == "unrolled":

        def unrolled(sequence: Any, state: Any, recurrent: Any, incoming: Any) -> Any:
            for turn in range(steps):
                state = step(state, sequence[turn], recurrent, incoming)
            return state

        return unrolled

    def scanned(sequence: Any, state: Any, recurrent: Any, incoming: Any) -> Any:
        def body(state: Any, row: Any) -> Any:
            return step(state, row, recurrent, incoming), None

        body = jax.checkpoint(body) if name == "checkpoint" else body
        return jax.lax.scan(body, state, sequence, unroll=UNROLL if name == "scan_unroll_8" else 1)[0]

    return scanned


def jax_gradient(name: str, steps: int) -> Callable[..., Any]:
    import jax

    function = last_state(name, steps)
    return jax.grad(lambda *given: (function(*given) ** 2).mean(), (2, 3))


def _jax(name: str, gradient: bool) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import jax.numpy as jnp

        given = to_jax(inputs(config))
        if gradient:
            return Staged(recorder, jax_gradient(name, config.steps), *given)
        if name in ("loop", "eager"):
            sequence, first, recurrent, incoming = given
            rows = list(sequence)

            def step(state: Any, row: Any) -> Any:
                return jnp.tanh(state @ recurrent + row @ incoming)

            turn = jax.jit(step) if name == "loop" else step

            def loop() -> Any:
                state = first
                for row in rows:
                    state = turn(state, row)
                return state

            return waited(loop)
        function, shown = last_state(name, config.steps), LOOPS.get(name)
        return Staged(recorder, function, *given, compilations=COMPILATIONS, excerpt=shown)

    return setup


def _torch(name: str, gradient: bool) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch
        from torch.utils.checkpoint import checkpoint

        sequence, first, recurrent, incoming = to_torch(inputs(config))

        def several(state: Any, rows: Any) -> Any:
            for row in rows:
                state = torch.tanh(state @ recurrent + row @ incoming)
            return state

        if not gradient:
            return OneThread(lambda: several(first, sequence))
        weights = (recurrent.requires_grad_(), incoming.requires_grad_())
        pieces = sequence.split(UNROLL)

        def slopes() -> Any:
            state = first
            for piece in pieces:
                if name == "torch_checkpoint":
                    state = checkpoint(several, state, piece, use_reentrant=False, preserve_rng_state=False)
                else:
                    state = several(state, piece)
            return torch.autograd.grad((state**2).mean(), weights)

        return OneThread(slopes)

    return setup


def flops(config: Config) -> float:
    """Of the products of a forward pass."""
    return 2.0 * 2 * BATCH * config.hidden**2 * config.steps


def variants(config: Config) -> Sequence[Variant]:
    found = []
    for group, names, factor in (
        (GROUP, ("scan", "scan_unroll_8", "unrolled", "loop", "eager", "torch"), 1),
        (GRADIENT, ("scan", "checkpoint", "torch", "torch_checkpoint"), 3),
    ):
        for name in names:
            is_torch = name.startswith("torch")
            setup = (_torch if is_torch else _jax)(name, group == GRADIENT)
            found.append(Variant(group, name, setup, factor * flops(config), threads=int(is_torch)))
    return found


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    steps, forward = config.steps, flops(config)
    call = costs.jitted_call(machine, 2.5)
    turn = costs.streamed_call(machine, 1.5, costs.program(machine, forward / steps, 2, 2))
    kernel, eager = machine["jax_kernel_s"], machine["jax_eager_call_s"] + machine["jax_handover_s"]
    operation, gradient = machine["torch_call_s"], machine["torch_recorded_call_s"]
    products = "rows of 16 are few for a product: its rate is not the square one's"
    found = []

    def say(group: str, name: str, seconds: float, because: str, suspect: str = products) -> None:
        found.append(Prediction(f"{group}/{name}", "time_s", seconds, because, suspect))

    for name, count in KERNELS.items():
        seconds = call + costs.program(machine, forward, 2 * steps, steps * count)
        say(GROUP, name, seconds, f"{forward:.3g} FLOPs, {steps} steps x {count} kernels x {us(kernel)}")
    wake = machine["jax_wake_s"]
    text = f"{steps} calls of one jitted step x {us(turn)} + waking XLA's thread {us(wake)}"
    say(GROUP, "loop", steps * turn + wake, text)
    say(
        GROUP,
        "eager",
        steps * OPERATIONS * eager + wake + costs.program(machine, forward, 2 * steps, 0),
        f"{steps} steps x {OPERATIONS} eager operations x {us(eager)}",
        "operators of Python's syntax on JAX arrays cost more than the function that the constant comes from",
    )
    say(
        GROUP,
        "torch",
        costs.torch_program(machine, forward, steps * TORCH[""], products=2 * steps, threads=1),
        f"{steps} steps x {TORCH['']} operations x {us(operation)}, {forward:.3g} FLOPs",
    )
    # A turn backward reads, adds to and writes both gradients, and turns both weights.
    weights = steps * 2 * 5.0 * costs.FLOAT * config.hidden**2
    moved = weights / machine.bandwidth(weights / steps)
    scan = call + costs.program(machine, 3 * forward, 6 * steps, steps * GRADIENT_KERNELS) + moved
    again = scan + costs.program(machine, forward, 2 * steps, steps * 2)
    kernels = f"{steps} steps x {GRADIENT_KERNELS} kernels"
    say(GRADIENT, "scan", scan, f"3 x forward: {3 * forward:.3g} FLOPs, {kernels}, {weights:.3g} B")
    say(GRADIENT, "checkpoint", again, f"4 x forward: {4 * forward:.3g} FLOPs, {kernels} and two more")
    plain = costs.torch_program(
        machine, 3 * forward, steps * TORCH["gradient"], "recorded", products=6 * steps, threads=1
    )
    say(
        GRADIENT,
        "torch",
        plain,
        f"{steps} steps x {TORCH['gradient']} operations with gradients x {us(gradient)}, 3 x the FLOPs",
    )
    repeated = costs.torch_program(machine, forward, steps * TORCH[""], products=2 * steps, threads=1)
    # Each tensor that autograd would keep is packed, packed again and unpacked by functions in Python, which
    # cost about as much as an operation.
    kept = steps * TORCH["kept"]
    hooks = 3 * kept * gradient
    say(
        GRADIENT,
        "torch_checkpoint",
        plain + repeated + hooks,
        f"the same, forward once more {us(repeated)}, {kept} kept tensors x 3 hooks {us(hooks)}",
        "what torch.utils.checkpoint itself costs a piece: its contexts and its closures",
    )
    for name, compiled in {**KERNELS_OF_PROGRAM, "unrolled": steps + 6}.items():
        each = machine["jax_compile_kernel_s"]
        found.append(
            Prediction(
                f"{GROUP}/{name}",
                "compile_s",
                machine["jax_compile_s"] + compiled * each,
                f"a program {1e3 * machine['jax_compile_s']:.3g} ms + {compiled} x {1e3 * each:.3g} ms",
                "kernels that XLA found equal and compiled once, or code generation on several threads",
            )
        )
    return found
