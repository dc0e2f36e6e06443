"""Ahead of time: a function is traced and lowered, then compiled, then run, each timed by itself.

``jax.jit(f)(x)`` does all three in its first call, so that a first call's time says little. The compiled
program also tells what XLA made: its kernels, FLOPs (``cost_analysis``) and temporary memory.
Source: JAX documentation, "Ahead-of-time lowering and compilation".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labs.lab import Recorder


def staged(
    recorder: Recorder, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Callable[..., Any]:
    """The compiled program of ``jax.jit(function, **options)`` for these arguments' shapes.

    Records ``trace_s`` (tracing and lowering), ``compile_s``, ``kernels``, ``xla_FLOP`` and ``temporary_B``.
    """
    import jax

    begin = recorder.now()
    lowered = jax.jit(function, **options).lower(*arguments)
    between = recorder.now()
    program = lowered.compile()
    end = recorder.now()
    recorder.record("trace", between - begin, "s")
    recorder.record("compile", end - between, "s")
    recorder.record("kernels", kernels(program.as_text()), "")
    cost = program.cost_analysis() or {}
    recorder.record("xla", float(cost.get("flops", 0.0)), "FLOP")
    memory = program.memory_analysis()
    if memory is not None:
        recorder.record("temporary", float(memory.temp_size_in_bytes), "B")
        recorder.record("reused", float(memory.alias_size_in_bytes), "B")
    return program


def kernels(hlo: str) -> int:
    """Fusions in a program's text: what XLA's CPU compiler makes a function of."""
    return hlo.count(" fusion(")
