"""One JAX program, run as it is (each operation compiled and dispatched by itself) or traced by jax.jit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.lab import Recorder
from labs.programming_models.captured import hlo

# XLA would share a matrix product between cores; here every way has one.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


class Jitted:
    """The first call compiles. At the end it records how often the function was traced and how long the first
    call took; the jaxpr and what XLA made of it are kept when it is set up."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], recorder: Recorder) -> None:
        import jax

        self._recorder, self._arguments = recorder, tuple(arguments)
        self._compile_s, self._traces = 0.0, 0

        def counted(*values: Any) -> Any:
            self._traces += 1  # a side effect: Python runs only while the function is traced
            return function(*values)

        backend()
        self._function = jax.jit(counted, compiler_options=ONE_THREAD)

    def __call__(self) -> Any:
        if self._compile_s:
            return self._function(*self._arguments)
        import jax

        begin = self._recorder.now()
        output = jax.block_until_ready(self._function(*self._arguments))
        self._compile_s = self._recorder.now() - begin
        return output

    def close(self) -> None:
        self._recorder.record("compile", self._compile_s, "s")
        self._recorder.record("graphs", self._traces, "")
        lowered = self._function.trace(*self._arguments)
        self._recorder.text("jaxpr", str(lowered.jaxpr))
        optimized = lowered.lower().compile().as_text()
        if optimized:
            self._recorder.text("optimized HLO of XLA", hlo(optimized))


def backend() -> None:
    """Start XLA and compile once, so that neither is part of a first call."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))


def eager(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[[], Any]:
    backend()
    return lambda: function(*arguments)
