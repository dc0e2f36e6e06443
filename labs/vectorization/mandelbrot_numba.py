"""Escape times of the Mandelbrot set, compiled. Imported when the lab runs, because it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from kernels.simd import full_width, maximum

f32 = np.float32
BLOCK = 64  # pixels iterated together: four 512-bit registers a variable, so that latencies overlap


@njit
def plain(real: np.ndarray, imaginary: np.ndarray, iterations: int) -> np.ndarray:
    """int32 (rows, columns): steps of z = z*z + c with |z| <= 2, at most ``iterations``; pixel by pixel."""
    counts = np.empty((imaginary.size, real.size), np.int32)
    for row in range(imaginary.size):
        for column in range(real.size):
            x = y = f32(0)
            count = 0
            while count < iterations:
                xx, yy = x * x, y * y
                if xx + yy > f32(4):
                    break
                y = (x + x) * y + imaginary[row]
                x = xx - yy + real[column]
                count += 1
            counts[row, column] = count
    return counts


@njit(error_model="numpy", fastmath={"contract"}, forceinline=True)
def iterate_block(
    real: np.ndarray, height: float, iterations: int, counts: np.ndarray, state: np.ndarray
) -> None:
    """All pixels of a block step together; no branch, and one test a step whether any pixel is left.

    Escaped pixels are stepped on, through inf to NaN, for which the comparison is False. Steps are counted
    in float32: int32 + int32 is int64 in numba, and the widest type decides how many lanes there are.
    """
    full_width()  # here: the loop is vectorised before it is inlined
    x, y, steps = state[0], state[1], state[2]
    for j in range(real.size):
        x[j] = y[j] = steps[j] = f32(0)
    for _ in range(iterations):
        left = f32(0)
        for j in range(real.size):
            xx, yy = x[j] * x[j], y[j] * y[j]
            alive = f32(1) if xx + yy <= f32(4) else f32(0)
            y[j] = (x[j] + x[j]) * y[j] + height
            x[j] = xx - yy + real[j]
            steps[j] += alive
            left = maximum(left, alive)
        if left == f32(0):
            break
    for j in range(real.size):
        counts[j] = np.int32(steps[j])


@njit(error_model="numpy", fastmath={"contract"})
def simd(real: np.ndarray, imaginary: np.ndarray, iterations: int) -> np.ndarray:
    counts = np.empty((imaginary.size, real.size), np.int32)
    state = np.empty((3, BLOCK), np.float32)
    for row in range(imaginary.size):
        for begin in range(0, real.size, BLOCK):
            end = min(begin + BLOCK, real.size)
            iterate_block(real[begin:end], imaginary[row], iterations, counts[row, begin:end], state)
    return counts


@njit(error_model="numpy", fastmath={"contract"}, parallel=True)
def parallel(real: np.ndarray, imaginary: np.ndarray, iterations: int) -> np.ndarray:
    counts = np.empty((imaginary.size, real.size), np.int32)
    for row in prange(imaginary.size):
        state = np.empty((3, BLOCK), np.float32)
        for begin in range(0, real.size, BLOCK):
            end = min(begin + BLOCK, real.size)
            iterate_block(real[begin:end], imaginary[row], iterations, counts[row, begin:end], state)
    return counts
