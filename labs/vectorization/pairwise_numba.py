"""Pairwise Euclidean distances, compiled. Imported when the lab runs, because it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from kernels.simd import full_width

# A sum may be reordered, and x * x + total fused: the two permissions that SIMD needs here.
REORDER = {"reassoc", "contract", "nsz"}


@njit
def plain(points: np.ndarray) -> np.ndarray:
    """Distances of all pairs of rows, (n, d) float32 -> (n, n); the additions in the order written."""
    count, dimensions = points.shape
    out = np.empty((count, count), np.float32)
    for i in range(count):
        for j in range(count):
            total = np.float32(0)
            for k in range(dimensions):
                difference = points[i, k] - points[j, k]
                total += difference * difference
            out[i, j] = np.sqrt(total)
    return out


@njit(error_model="numpy", fastmath=REORDER)
def simd(points: np.ndarray) -> np.ndarray:
    """The same source; what changed is the line above and the next one."""
    full_width()
    count, dimensions = points.shape
    out = np.empty((count, count), np.float32)
    for i in range(count):
        for j in range(count):
            total = np.float32(0)
            for k in range(dimensions):
                difference = points[i, k] - points[j, k]
                total += difference * difference
            out[i, j] = np.sqrt(total)
    return out


@njit(error_model="numpy", fastmath=REORDER, parallel=True)
def parallel(points: np.ndarray) -> np.ndarray:
    """And on all cores: each takes rows of the result."""
    count, dimensions = points.shape
    out = np.empty((count, count), np.float32)
    for i in prange(count):
        full_width()  # here, because numba makes the body a function of its own
        for j in range(count):
            total = np.float32(0)
            for k in range(dimensions):
                difference = points[i, k] - points[j, k]
                total += difference * difference
            out[i, j] = np.sqrt(total)
    return out
