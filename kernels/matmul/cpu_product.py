"""Blocked matrix products on the CPU: A is packed once, B block by block where it is used.

One body serves every source of B: bfloat16, and int8 or int4 weights, which are widened while they are packed. A
block of B (``_DEPTH`` words deep, ``_WIDTH`` columns) is packed into the second-level cache of the thread that needs
it and used for ``_HEIGHT`` rows of the output, so that packing costs a few instructions in a hundred; the sums of
the block of the output stay in cache, as float32, until they are complete.

Source: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication" (blocks and panels).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from kernels.matmul.cpu_tile import Tile
from kernels.simd import bits_as_float, float_as_bits, full_width
from kernels.storage import narrow, widen
from kernels.threads import chunked

f32 = np.float32
_DEPTH = 256  # words of a block of B
_WIDTH = 128  # its columns
_HEIGHT = 192  # rows of the output that share it

_inline = njit(error_model="numpy", fastmath={"contract"})


@_inline
def pair_of(low: Any, high: Any) -> Any:
    """Two float32 that are bfloat16 numbers in one word, the first in the lower half; typed as float32."""
    upper = float_as_bits(high) & np.int32(-65536)
    return bits_as_float(upper | ((float_as_bits(low) >> np.int32(16)) & np.int32(0xFFFF)))


# --- rows of a source as float32 -----------------------------------------------------------------


@_inline
def floats_row(source: Any, row: Any, start: Any, stop: Any, bits: Any, group: Any, out: Any) -> None:
    """out[: stop - start] = source[row, start:stop] of floats; bits and group are not used."""
    line = source[row, start:stop]
    for j in range(stop - start):
        out[j] = widen(line[j])


@_inline
def integers_row(source: Any, row: Any, start: Any, stop: Any, bits: Any, group: Any, out: Any) -> None:
    """The same of int8 weights, or of int4 weights as ``quantize_int4`` packs them."""
    if bits == 8:
        line = source[row, start:stop]
        for j in range(stop - start):
            out[j] = f32(line[j])
        return
    half = group // 2
    position = start
    while position < stop:  # up to the end of a half group at a time
        first, within = position // group * group, position % group
        upper = within >= half
        byte = first // 2 + within - (half if upper else 0)
        count = min(stop - position, half - within + (half if upper else 0))
        shift = np.int32(4 if upper else 0)
        line, target = source[row, byte : byte + count], out[position - start : position - start + count]
        for j in range(count):
            nibble = (np.int32(line[j]) >> shift) & np.int32(15)
            target[j] = f32(np.int32(nibble - np.int32(8)))
        position += count


# --- packing A -----------------------------------------------------------------------------------


@cache
def _pack_rows(tile: Tile, transposed: bool) -> Any:
    """A body that packs panels of ``tile.rows`` rows of A, filled up with zeros.

    source: (m, k), or (k, m) where transposed. out: (panels, words, rows), or (panels, rows, words) by_rows.
    """
    height, pair, by_rows = tile.rows, tile.pair, tile.by_rows

    @_inline
    def element(source, row, k):
        if transposed:
            return widen(source[k, row]) if k < source.shape[0] and row < source.shape[1] else f32(0)
        return widen(source[row, k]) if k < source.shape[1] and row < source.shape[0] else f32(0)

    @chunked
    def pack(chunk, source, out):
        full_width()
        words = out.shape[2] if by_rows else out.shape[1]
        for i in range(height):
            row = chunk * height + i
            for w in range(words):
                if pair == 1:
                    value = element(source, row, w)
                else:
                    value = pair_of(element(source, row, 2 * w), element(source, row, 2 * w + 1))
                if by_rows:
                    out[chunk, i, w] = value
                else:
                    out[chunk, w, i] = value

    return pack


# --- the product ---------------------------------------------------------------------------------


@cache
def _product(tile: Tile, transposed: bool, integers: bool, scaled_rows: bool) -> Any:
    """A body that computes one block of the output.

    a: packed. source of B: (k, n), or (n, k) where transposed. scale: (rows of source, groups) or None: with
    scaled_rows the source's rows are multiplied while packed (B not transposed), else the sums of each group are.
    """
    height, width, pair = tile.rows, tile.columns, tile.pair
    multiply, begin, end, config, by_rows = tile.multiply, tile.begin, tile.end, tile.config, tile.by_rows
    multiple = tile.steps
    read = integers_row if integers else floats_row

    @_inline
    def pack(source, scale, bits, group, k, stop, words, column, columns, lines, out):
        """Words k to stop of ``columns`` columns in panels of (words, width)."""
        if transposed:
            for panel in range((columns + width - 1) // width):
                start = panel * words * width
                target = out[start : start + words * width].reshape(words, width)
                line = lines[0]
                for j in range(width):
                    n = column + panel * width + j
                    if panel * width + j < columns:
                        read(source, n, k, stop, bits, group, lines[0])
                        lines[0, stop - k : words * pair] = f32(0)
                    else:
                        lines[0, : words * pair] = f32(0)
                    for w in range(words):
                        target[w, j] = line[w] if pair == 1 else pair_of(line[2 * w], line[2 * w + 1])
            return
        for w in range(words):
            for part in range(pair):
                row = k + w * pair + part
                lines[part, :] = f32(0)
                if row < stop:
                    read(source, row, column, column + columns, bits, group, lines[part])
                    if scaled_rows:
                        for j in range(columns):
                            lines[part, j] *= scale[row, (column + j) // group]
            for panel in range((columns + width - 1) // width):
                start = (panel * words + w) * width
                target = out[start : start + width]
                low = lines[0, panel * width : (panel + 1) * width]
                high = lines[pair - 1, panel * width : (panel + 1) * width]
                for j in range(width):
                    target[j] = low[j] if pair == 1 else pair_of(low[j], high[j])

    @chunked
    def product(chunk, across, depth, a, source, scale, bits, group, bias, out):
        full_width()
        m, n = out.shape
        panels_at_once = max(1, _HEIGHT // height)
        first_panel = chunk // across * panels_at_once
        panels = min(panels_at_once, a.shape[0] - first_panel)
        column = chunk % across * _WIDTH
        columns = min(_WIDTH, n - column)
        column_panels = (columns + width - 1) // width
        all_words = a.shape[2] if by_rows else a.shape[1]
        sums = np.zeros((panels * height, _WIDTH), np.float32)
        flat = sums.reshape(-1)
        packed = np.empty(_DEPTH * _WIDTH, np.float32)
        lines = np.empty((pair, max(_WIDTH, _DEPTH * pair)), np.float32)
        factors = np.ones(_WIDTH, np.float32)
        whole = a.reshape(-1)
        begin(config)
        k = 0
        while k < depth:
            stop = min(k + _DEPTH * pair, depth)
            if scale is not None and not scaled_rows:
                stop = min(stop, (k // group + 1) * group)  # one factor for the whole block
                for j in range(columns):
                    factors[j] = scale[column + j, k // group]
            words = (stop - k + pair * multiple - 1) // (pair * multiple) * multiple
            pack(source, scale, bits, group, k, stop, words, column, columns, lines, packed)
            for p in range(panels):
                start = (first_panel + p) * all_words * height + k // pair * (1 if by_rows else height)
                for q in range(column_panels):
                    multiply(
                        whole, start, all_words, packed, q * words * width, words,
                        factors, q * width, flat, p * height * _WIDTH + q * width, _WIDTH,
                    )  # fmt: skip
            k = stop
        end()
        row = first_panel * height
        for i in range(min(panels * height, m - row)):
            for j in range(columns):
                out[row + i, column + j] = narrow(sums[i, j] + bias[column + j], out)

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
    scaled_rows: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = a @ b with this tile; every tensor contiguous and two-dimensional, bias (n,) float32.

    a: (m, k) floats, or (k, m) where transpose_a. b: (k, n), or (n, k) where transpose_b: bfloat16, or weights of
    ``bits`` 8 or 4 with scale (rows of b, groups) float32. out: (m, n). A tile of bfloat16 pairs takes a only in
    bfloat16.
    """
    m, n = out.shape
    depth = a.shape[0] if transpose_a else a.shape[1]
    multiple = tile.pair * tile.steps
    words = -(-depth // multiple) * tile.steps
    panels = -(-m // tile.rows)
    if not m or not n:
        return out
    shape = (panels, tile.rows, words) if tile.by_rows else (panels, words, tile.rows)
    packed = torch.empty(shape, dtype=torch.float32)
    _pack_rows(tile, transpose_a)(panels if words else 0, a, packed)
    across = -(-n // _WIDTH)
    chunks = across * -(-panels // max(1, _HEIGHT // tile.rows))
    group = 1
    if scale is not None:
        in_features = b.shape[1] * (2 if bits == 4 else 1)
        group = max(1, in_features // max(1, scale.shape[1]))
    body = _product(tile, transpose_b, bits > 0, scaled_rows)
    bias = torch.zeros(n) if bias is None else bias
    body(chunks, across, depth, packed, b, scale, bits, group, bias, out)
    return out
