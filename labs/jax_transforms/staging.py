"""Ahead of time: a function is traced and lowered, then compiled, then run, each timed by itself.

``jax.jit(f)(x)`` does all three in its first call, and so does a ``Staged`` step. The compiled program also
tells what XLA made: its kernels, FLOPs (``cost_analysis``, which counts what is in a loop once, however often
it runs) and memory.
Source: JAX documentation, "Ahead-of-time lowering and compilation".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms.excerpts import Excerpt
from labs.lab import Recorder, Step

Carry = Callable[[Any, Sequence[Any]], Sequence[Any]]


class Staged:
    """The step ``jax.jit(function, **options)(*arguments)``, waited for: what is only handed to XLA's thread
    takes a time that depends on how many calls stand in a row.

    carry: ``carry(output, arguments)`` are the arguments of the next call, where that goes on from this one.
    compilations: how many there are in all; those after the first are made at the end, for a median.
    excerpt: of its programs, kept as a text.

    At the end it records ``trace_s`` (tracing and lowering), ``compile_s`` (one for each compilation),
    ``kernels``, ``xla_FLOP`` (loops once), ``temporary_B``, ``output_B`` and, of the output, ``reused_B``.
    """

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Any],
        *arguments: Any,
        carry: Carry | None = None,
        compilations: int = 1,
        excerpt: Excerpt | None = None,
        **options: Any,
    ) -> None:
        import jax

        self._recorder, self._function, self._options = recorder, function, options
        self._arguments, self._carry, self._compilations = arguments, carry, compilations
        self._excerpt, self._wait = excerpt, jax.block_until_ready
        self._lowered: Any = None
        self._program: Any = None
        self._seconds: list[tuple[float, float]] = []

    def __call__(self) -> Any:
        if self._program is None:
            self._lowered, self._program = self._compiled()
        output = self._wait(self._program(*self._arguments))
        if self._carry is not None:
            self._arguments = tuple(self._carry(output, self._arguments))
        return output

    def _compiled(self) -> tuple[Any, Any]:
        import jax

        begin = self._recorder.now()
        # A function of its own each time: JAX knows those that it has traced.
        lowered = jax.jit(lambda *given: self._function(*given), **self._options).lower(*self._arguments)
        between = self._recorder.now()
        program = lowered.compile()
        self._seconds.append((between - begin, self._recorder.now() - between))
        return lowered, program

    def close(self) -> None:
        if self._program is None:
            return  # its first call failed
        while len(self._seconds) < self._compilations:
            self._compiled()
        for traced, compiled in self._seconds:
            self._recorder.record("trace", traced, "s")
            self._recorder.record("compile", compiled, "s")
        self._recorder.record("kernels", kernels(self._program.as_text()), "")
        self._recorder.record("xla", float((self._program.cost_analysis() or {}).get("flops", 0.0)), "FLOP")
        memory = self._program.memory_analysis()
        if memory is not None:
            self._recorder.record("temporary", float(memory.temp_size_in_bytes), "B")
            self._recorder.record("output", float(memory.output_size_in_bytes), "B")
            self._recorder.record("reused", float(memory.alias_size_in_bytes), "B")
        if self._excerpt is not None:
            lines = self._excerpt.lines(self._lowered, self._program)
            self._recorder.text(self._excerpt.title, f"{self._excerpt.explains}\n\n{lines}")


def waited(step: Step) -> Step:
    """A step of other calls of JAX's, which ends when they are done."""
    import jax

    return lambda: jax.block_until_ready(step())


def kernels(hlo: str) -> int:
    """Fusions in a program's text: what XLA's CPU compiler makes a function of."""
    return hlo.count(" fusion(")
