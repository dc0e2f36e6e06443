"""Floating-point operations of operators whose inputs' dimensions say them: products of matrices, attention.

PyTorch writes dimensions (``record_shapes``) but no FLOPs. Only operators that do the work themselves are
counted: ``aten::linear`` and ``aten::matmul`` call one of these and would count twice. A multiply-add is two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from bench.traces.events import Trace, distinct

Dims = list[list[int]]


def _product(first: list[int], second: list[int]) -> float:
    """(..., m, k) times (..., k, n)."""
    return 2.0 * math.prod(first) * second[-1] if first else 0.0


def _attention(dims: Dims) -> float:
    """query (batch, heads, length, width), key, value: two products; a mask saves nothing here."""
    query, key, value = dims[:3]
    if not query:
        return 0.0
    return 2.0 * math.prod(query) * key[-2] + 2.0 * math.prod(query[:-1]) * key[-2] * value[-1]


OPERATORS: dict[str, Callable[[Dims], float]] = {
    "aten::mm": lambda dims: _product(dims[0], dims[1]),
    "aten::bmm": lambda dims: _product(dims[0], dims[1]),
    "aten::addmm": lambda dims: _product(dims[1], dims[2]),
    "aten::baddbmm": lambda dims: _product(dims[1], dims[2]),
    **{
        f"aten::_scaled_dot_product_{way}": _attention
        for way in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
}


def count_flops(trace: Trace) -> None:
    """Fills ``trace.events.flops``, in place, where the dimensions tell them."""
    events = trace.events
    for code, name in enumerate(trace.names):
        if name in OPERATORS:
            rows = np.flatnonzero((events.name == code) & (events.shape >= 0))
            for shape in distinct(events.shape[rows]).tolist():
                same = rows[events.shape[rows] == shape]
                events.flops[same] = flops_of(name, trace.shapes[shape])


def flops_of(name: str, shape: str) -> float:
    """Of one call; 0 where the operator or its dimensions are unknown."""
    try:
        dims: Any = msgspec.json.decode(shape)
        whole = [d if isinstance(d, list) and all(type(size) is int for size in d) else [] for d in dims]
        found = OPERATORS[name](whole)
    except (msgspec.DecodeError, ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
        return 0.0
    return found if 0 <= found < math.inf else 0.0
