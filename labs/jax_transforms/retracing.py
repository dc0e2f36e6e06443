"""Each new shape is a new program: tracing and compiling are paid again, unless shapes are padded to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms.arrays import random
from labs.jax_transforms.config import Config
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine

GROUP, SHORTEST = "retracing", 100
ROUNDS = 5  # each compiles everything anew


def sequences(config: Config) -> list[Any]:
    """``lengths`` vectors of 100, 101, ... numbers, float32."""
    return random(71, *[(SHORTEST + more,) for more in range(config.lengths)])


def reference(config: Config, name: str) -> Any:
    import numpy as np

    return np.array([(array.astype("float64") ** 2).sum() for array in sequences(config)])


def _setup(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import numpy as np

        given = sequences(config)
        if name == "padded":  # the squares of the zeros behind add nothing
            longest = max(map(len, given))
            given = [np.pad(array, (0, longest - len(array))) for array in given]

        def step() -> Any:
            """All calls of a function that JAX has not seen before, the first as the next time."""
            traces = []

            def total(x: Any) -> Any:
                traces.append(x)  # on purpose: what happens in Python happens when traced
                return (x * x).sum()

            function = jax.jit(total)
            found = np.array([function(array) for array in given])
            recorder.record("traces", len(traces), "")
            return found

        return step

    return setup


def variants(config: Config) -> Sequence[Variant]:
    return [
        Variant(GROUP, name, _setup(name), threads=0, max_rounds=ROUNDS)
        for name in ("every_length", "padded")
    ]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    program = machine["jax_first_call_s"]
    found = []
    for name, traces in (("every_length", config.lengths), ("padded", 1)):
        address = f"{GROUP}/{name}"
        because = f"{traces} x tracing, compiling and calling a program of an array, {program * 1e3:.3g} ms"
        suspect = "programs so small that their compilation is mostly fixed cost, which differs by program"
        found.append(Prediction(address, "time_s", traces * program, because, suspect))
        found.append(Prediction(address, "traces", traces, "one for each shape", exact=True))
    return found
