"""Shortest paths between all pairs, compiled. Imported when the lab runs, because it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from kernels.simd import full_width, minimum


@njit
def plain(weights: np.ndarray) -> np.ndarray:
    """Floyd-Warshall as in the textbook: (n, n) float32 -> (n, n)."""
    distance = weights.copy()
    count = distance.shape[0]
    for k in range(count):
        for i in range(count):
            for j in range(count):
                through = distance[i, k] + distance[k, j]
                if through < distance[i, j]:
                    distance[i, j] = through
    return distance


@njit(forceinline=True)
def relax_row(row: np.ndarray, via: np.ndarray, first: float) -> None:
    """No branch, and ``via`` is a copy: the compiler need not fear that storing to ``row`` changes it."""
    full_width()  # here: the loop is vectorised before it is inlined
    for j in range(row.size):
        row[j] = minimum(row[j], first + via[j])


@njit
def simd(weights: np.ndarray) -> np.ndarray:
    distance = weights.copy()
    for k in range(distance.shape[0]):
        via = distance[k].copy()
        for i in range(distance.shape[0]):
            relax_row(distance[i], via, distance[i, k])
    return distance


@njit(parallel=True)
def parallel(weights: np.ndarray) -> np.ndarray:
    """The rows of one step on all cores; the steps need one another, so that cores meet after each."""
    distance = weights.copy()
    for k in range(distance.shape[0]):
        via = distance[k].copy()
        for i in prange(distance.shape[0]):
            relax_row(distance[i], via, distance[i, k])
    return distance
