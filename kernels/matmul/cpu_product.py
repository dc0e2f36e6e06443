"""Blocked matrix products on the CPU, of factors that ``cpu_pack`` has packed.

A block of the output (``_HEIGHT`` x ``_WIDTH``) is one chunk of work: its sums stay in the second-level cache
as float32 while the common dimension passes by in blocks of ``_DEPTH`` words, a panel of A held in the first
level. B is packed by strips that stay in the last level, each used for all rows of A.

Source: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication" (blocks and panels).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from kernels.matmul.cpu_pack import column_chunks, pack_columns, pack_lines
from kernels.matmul.cpu_tile import Tile
from kernels.simd import full_width
from kernels.storage import narrow
from kernels.threads import chunked

_DEPTH = 256  # words
_WIDTH = 128  # columns
_HEIGHT = 192  # rows
_STRIP_BYTES = 8 << 20  # of packed B


@cache
def _product(tile: Tile) -> Any:
    """A body for one block of the output: out[:, first:] = (a @ b, times scale by groups of k) + bias.

    a, b: packed. scale: (n, groups), of ``group`` words each.
    """
    height, width, multiply = tile.rows, tile.columns, tile.multiply
    panels_at_once = max(1, _HEIGHT // height)
    columns_at_once = _WIDTH // width

    @chunked
    def product(chunk, across, first, a, b, scale, group, bias, out):
        full_width()
        m, n = out.shape
        words = b.shape[1]
        low_panel = chunk // across * panels_at_once
        panels = min(panels_at_once, a.shape[0] - low_panel)
        low_column = chunk % across * columns_at_once
        column_panels = min(columns_at_once, b.shape[0] - low_column)
        column = first + low_column * width
        columns = min(column_panels * width, n - column)
        sums = np.zeros((panels * height, _WIDTH), np.float32)
        flat = sums.reshape(-1)
        factors = np.zeros(_WIDTH, np.float32)
        left, right = a.reshape(-1), b.reshape(-1)
        word = 0
        while word < words:
            within = word // group
            stop = min(word + _DEPTH, (within + 1) * group, words)  # one factor for the whole block
            for j in range(columns):
                factors[j] = scale[column + j, within]
            for p in range(panels):
                start = ((low_panel + p) * words + word) * height
                for q in range(column_panels):
                    multiply(
                        left, start, right, ((low_column + q) * words + word) * width, stop - word,
                        factors, q * width, flat, p * height * _WIDTH + q * width, _WIDTH,
                    )  # fmt: skip
            word = stop
        for i in range(min(panels * height, m - low_panel * height)):
            source, shift = sums[i], bias[column : column + columns]
            target = out[low_panel * height + i, column : column + columns]
            for j in range(columns):
                target[j] = narrow(source[j] + shift[j], out)

    return product


def product(
    tile: Tile,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bits: int = 0,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = a @ b + bias with this tile; matrices contiguous, bias (n,) float32.

    a: (m, k), or (k, m) where transpose_a. b: (k, n), or (n, k) where transpose_b: of floats; or int8
    weights, or packed int4 weights, with ``bits`` 8 or 4 and scale (rows of b, groups) float32. A tile of
    pairs takes floats in bfloat16 only, and integers only where transpose_b (scaled integers are no bfloat16
    numbers).
    """
    m, n = out.shape
    if not m or not n:
        return out
    depth = a.shape[0] if transpose_a else a.shape[1]
    words = -(-depth // tile.pair)
    panels = -(-m // tile.rows)
    left = torch.empty((panels, words, tile.rows), dtype=torch.float32)
    group = 1
    if bits and scale is not None:
        group = max(1, b.shape[1] * (8 // bits) // max(1, scale.shape[1]))
    unscaled = torch.ones((n, 1), dtype=torch.float32)
    if transpose_a:
        body = pack_columns(tile.rows, tile.pair, False)
        body(column_chunks(panels, tile.rows), a, 0, depth, 0, 1, unscaled, left)
    else:
        pack_lines(tile.rows, tile.pair, False)(panels, a, 0, depth, 0, 1, left)
    by_groups = transpose_b and scale is not None
    factors = scale if by_groups and scale is not None else unscaled
    factor_words = group // tile.pair if by_groups and factors.shape[1] > 1 else max(1, words)
    if bias is None:
        bias = torch.zeros(n, dtype=torch.float32)
    strip = max(_WIDTH, _STRIP_BYTES // (4 * max(1, words)) // _WIDTH * _WIDTH)
    down = -(-panels // max(1, _HEIGHT // tile.rows))
    right = torch.empty((-(-min(strip, n) // tile.columns), words, tile.columns), dtype=torch.float32)
    for first in range(0, n, strip):
        count = -(-min(strip, n - first) // tile.columns)
        part = right[:count]
        if transpose_b:
            pack_lines(tile.columns, tile.pair, bits > 0)(count, b, first, depth, bits, group, part)
        else:
            body = pack_columns(tile.columns, tile.pair, bits > 0)
            chunks = column_chunks(count, tile.columns)
            body(chunks, b, first, depth, bits, group, unscaled if scale is None else scale, part)
        across = -(-count // (_WIDTH // tile.columns))
        _product(tile)(across * down, across, first, left, part, factors, factor_words, bias, out)
    return out
