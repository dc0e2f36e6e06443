"""The Black-Scholes formula, compiled. Imported when the lab runs, because it needs numba."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from kernels.simd import exp_float32, full_width, log_float32, normal_cdf_float32

f32 = np.float32
HALF, ONE, ROOT_HALF = f32(0.5), f32(1), f32(math.sqrt(0.5))


@njit
def plain(
    spot: np.ndarray, strike: np.ndarray, years: np.ndarray, rate: float, volatility: float
) -> np.ndarray:
    """Call and put prices, (2, n) float32; log, exp and erf are calls of the C library, one number each."""
    out = np.empty((2, spot.size), np.float32)
    for i in range(spot.size):
        spread = volatility * math.sqrt(years[i])
        upper = (math.log(spot[i] / strike[i]) + (rate + HALF * volatility * volatility) * years[i]) / spread
        lower = upper - spread
        discounted = strike[i] * math.exp(-rate * years[i])
        call = spot[i] * (HALF + HALF * math.erf(upper * ROOT_HALF)) - discounted * (
            HALF + HALF * math.erf(lower * ROOT_HALF)
        )
        out[0, i] = call
        out[1, i] = call - spot[i] + discounted
    return out


@njit(error_model="numpy", fastmath={"contract"}, forceinline=True)
def price_block(
    spot: np.ndarray,
    strike: np.ndarray,
    years: np.ndarray,
    rate: float,
    volatility: float,
    calls: np.ndarray,
    puts: np.ndarray,
) -> None:
    """Inline arithmetic instead of calls, and no test for a zero divisor: the loop is packed."""
    full_width()  # here: the loop is vectorised before it is inlined
    for i in range(spot.size):
        spread = volatility * math.sqrt(years[i])
        upper = (
            log_float32(spot[i] / strike[i]) + (rate + HALF * volatility * volatility) * years[i]
        ) / spread
        discounted = strike[i] * exp_float32(-rate * years[i])
        call = spot[i] * normal_cdf_float32(upper) - discounted * normal_cdf_float32(upper - spread)
        calls[i] = call
        puts[i] = call - spot[i] + discounted


@njit(error_model="numpy", fastmath={"contract"})
def simd(
    spot: np.ndarray, strike: np.ndarray, years: np.ndarray, rate: float, volatility: float
) -> np.ndarray:
    out = np.empty((2, spot.size), np.float32)
    price_block(spot, strike, years, rate, volatility, out[0], out[1])
    return out


@njit(error_model="numpy", fastmath={"contract"}, parallel=True)
def parallel(
    spot: np.ndarray, strike: np.ndarray, years: np.ndarray, rate: float, volatility: float, blocks: int
) -> np.ndarray:
    out = np.empty((2, spot.size), np.float32)
    for block in prange(blocks):
        begin, end = spot.size * block // blocks, spot.size * (block + 1) // blocks
        price_block(
            spot[begin:end],
            strike[begin:end],
            years[begin:end],
            rate,
            volatility,
            out[0, begin:end],
            out[1, begin:end],
        )
    return out
