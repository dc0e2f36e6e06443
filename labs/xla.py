"""What XLA's client for CPUs, and JAX in front of it, do with a program, whichever lab runs it."""

from __future__ import annotations

INLINE_FLOPS = 1000
"""A program with fewer FLOPs runs on the thread that calls; any other is handed to a thread of XLA's."""

EAGER_GRADIENT = 3
"""Eager operations that one of a function becomes under ``jax.grad``: forward, its slope, their product."""
