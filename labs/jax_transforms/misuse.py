"""The mistakes that JAX's transformations invite, made on purpose: each must get a message that helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labs.jax_transforms.config import Config
from labs.jax_transforms.guards import TransformError, explained, guarded
from labs.lab import Recorder, Step, Variant

VARIANT = "misuse/all"
SILENT = "no message"


def side_effect() -> None:
    """A list that would grow by a tracer at the first call, and by nothing at others."""
    losses: list[Any] = []

    def step(x: Any) -> Any:
        losses.append(x.sum())
        return x * 2

    guarded(step)(_numbers())


def leaked_tracer() -> None:
    """A running sum that becomes a tracer, which means nothing once the trace is over."""
    import jax.numpy as jnp

    total = jnp.zeros(())

    def step(x: Any) -> Any:
        nonlocal total
        total = total + x.sum()
        return x * 2

    guarded(step)(_numbers())


def changed_element() -> None:
    """One number of an array in a list, too long for its text to show."""
    import numpy as np

    buffers = [np.zeros(2000)]

    def step(x: Any) -> Any:
        buffers[0][1000] += 1.0
        return x * 2

    guarded(step)(_numbers())


def printing() -> None:
    def step(x: Any) -> Any:
        print("x is", x)
        return x * 2

    guarded(step)(_numbers())


def branch() -> None:
    def absolute(x: Any) -> Any:
        return x if x > 0 else -x

    guarded(absolute)(1.0)


def data_dependent_shape() -> None:
    def positive(x: Any) -> Any:
        return x[x > 0].sum()

    guarded(positive)(_numbers())


def key_twice() -> None:
    """Two layers that start from the same numbers."""
    import jax

    def layers(key: Any) -> Any:
        return jax.random.normal(key, (4,)), jax.random.normal(key, (4,))

    guarded(layers)(jax.random.key(0))


def donated_again() -> None:
    """The old weights, after their memory went into the new ones."""
    update = guarded(lambda weights: weights - 0.1, donate_argnums=0)
    weights = _numbers()
    update(weights)
    update(weights)


def donated_elsewhere() -> None:
    update = guarded(lambda weights: weights - 0.1, donate_argnums=0)
    weights = _numbers()
    update(weights)
    with explained():
        print(weights + 1)


def _numbers() -> Any:
    import jax.numpy as jnp

    return jnp.linspace(-1.0, 1.0, 8)


CASES: Mapping[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "side_effect": (side_effect, ("step changes 'losses'", "once for each shape")),
    "leaked_tracer": (leaked_tracer, ("step changes 'total'", "once for each shape")),
    "changed_element": (changed_element, ("step changes 'buffers'", "once for each shape")),
    "printing": (printing, ("step prints", "jax.debug.print")),
    "branch": (branch, ("absolute", "if x > 0", "jax.lax.cond")),
    "data_dependent_shape": (data_dependent_shape, ("positive", "mask", "jax.numpy.where")),
    "key_twice": (key_twice, ("layers", "one random key", "split")),
    "donated_again": (donated_again, ("'weights'", "given away", "that call's result")),
    "donated_elsewhere": (donated_elsewhere, ("given away", "that call's result")),
}
"""Name -> the mistake, and what its message must say."""


def message(name: str) -> str:
    """What the lab says to a mistake; ``no message`` where it passed in silence."""
    try:
        CASES[name][0]()
    except TransformError as error:
        return str(error)
    return SILENT


def _setup(config: Config, recorder: Recorder) -> Step:
    def step() -> object:
        found = {name: message(name) for name in CASES}
        for name, text in found.items():
            recorder.record(f"{name}_caught", float(text != SILENT), "")
            recorder.text(f"What the lab says to {name.replace('_', ' ')}", text)
        return found

    return step


def variants(config: Config) -> Sequence[Variant]:
    """One variant: what matters is what it says."""
    group, name = VARIANT.split("/")
    return [Variant(group, name, _setup, max_rounds=1)]
