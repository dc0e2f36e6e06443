"""One JAX program, run as it is (each operation compiled and dispatched by itself) or traced by jax.jit.

Each call is waited for, as each of torch's and NumPy's is over when it returns: what is only handed to XLA's
thread would take a time that depends on how many calls stand in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.lab import Recorder
from labs.programming_models.captured import hlo

# A product of a jitted program stays on one thread, though independent ones may go to several. Eager
# operations take no options: XLA cuts the larger ones for all cores.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


class Jitted:
    """``jax.jit(function)(*arguments)``, waited for. The first call compiles.

    At the end it records how long that took and how often the function was traced, and keeps the jaxpr and
    what XLA made of it.

    compilations: how many first calls there are in all; those after the first, each of a function that JAX
    has not seen before, are made at the end, for a median.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        recorder: Recorder,
        compilations: int = 1,
    ) -> None:
        import jax

        self._recorder, self._arguments = recorder, tuple(arguments)
        self._plain, self._compilations = function, compilations
        self._compile_s, self._traces = 0.0, 0

        def counted(*values: Any) -> Any:
            self._traces += 1  # a side effect: Python runs only while the function is traced
            return function(*values)

        backend()
        self._function, self._wait = jax.jit(counted, compiler_options=ONE_THREAD), jax.block_until_ready

    def __call__(self) -> Any:
        if self._compile_s:
            return self._wait(self._function(*self._arguments))
        output, self._compile_s = self._first(self._function)
        return output

    def _first(self, function: Callable[..., Any]) -> tuple[Any, float]:
        begin = self._recorder.now()
        output = self._wait(function(*self._arguments))
        return output, self._recorder.now() - begin

    def close(self) -> None:
        import jax

        self._recorder.record("compile", self._compile_s, "s")
        for _ in range(1, self._compilations):
            again = jax.jit(lambda *values: self._plain(*values), compiler_options=ONE_THREAD)
            self._recorder.record("compile", self._first(again)[1], "s")
        self._recorder.record("graphs", self._traces, "")
        lowered = self._function.trace(*self._arguments)
        self._recorder.text("jaxpr", str(lowered.jaxpr))
        optimized = lowered.lower().compile().as_text() or ""
        self._recorder.record("kernels", optimized.count(" fusion("), "")
        self._recorder.text("optimized HLO of XLA", hlo(optimized))


def backend() -> None:
    """Start XLA and compile once, so that neither is part of a first call."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))


def eager(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[[], Any]:
    """``function(*arguments)``, waited for at its end; the operations before go over in a row."""
    import jax

    backend()
    return lambda: jax.block_until_ready(function(*arguments))
