"""Factors of a matrix product as the register tiles want them: panels of 32-bit words, filled up with zeros.

A word is a float32, or two bfloat16 of consecutive k. Panel p of a factor holds ``width`` of its rows (of A)
or columns (of B); in it, word w of all of them lies together: (panels, words, width). One body serves all
sources: floats, and int8 or int4 weights, which are widened on the way. Where k is contiguous in memory the
panel is a transpose, done in registers, 16 x 16 words at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.ir_vectors import FLOAT, LONG, address, load, shuffle, store
from kernels.simd import bits_as_float, float_as_bits, full_width
from kernels.storage import widen
from kernels.threads import chunked

f32 = np.float32
AT_ONCE = 256  # words, or columns, that are packed at a time
_LANES = 16

_inline = njit(error_model="numpy", fastmath={"contract"})


@_inline
def _pair(low: Any, high: Any) -> Any:
    """Two float32 that are bfloat16 numbers in one word, the first in the lower half; typed as float32."""
    upper = float_as_bits(high) & np.int32(-65536)
    return bits_as_float(upper | ((float_as_bits(low) >> np.int32(16)) & np.int32(0xFFFF)))


# --- rows of a source as float32 -----------------------------------------------------------------


@_inline
def _read_floats(source: Any, row: Any, start: Any, stop: Any, bits: Any, group: Any, out: Any) -> None:
    """out[: stop - start] = source[row, start:stop] of floats; bits and group are not used."""
    line = source[row, start:stop]
    for j in range(stop - start):
        out[j] = widen(line[j])


@_inline
def _read_integers(source: Any, row: Any, start: Any, stop: Any, bits: Any, group: Any, out: Any) -> None:
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
        count = min(stop - position, (group if upper else half) - within)
        shift = np.int32(4 if upper else 0)
        line, target = source[row, byte : byte + count], out[position - start : position - start + count]
        for j in range(count):
            nibble = (np.int32(line[j]) >> shift) & np.int32(15)
            target[j] = f32(np.int32(nibble - np.int32(8)))
        position += count


# --- transposing in registers --------------------------------------------------------------------


@cache
def _transpose(rows: int) -> Any:
    """Intrinsic (source, word, target, start, stride): a block of 16 lines and 16 words, transposed.

    target[start + w * stride + i] = source[i, word + w] for i < rows (at most 16) and w < 16. Four rounds of
    unpacking neighbours at distance 8, 4, 2 and 1: the perfect shuffle, generic vector code.
    """

    @intrinsic
    def transpose(typing: Any, source: Any, word: Any, target: Any, start: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = ir.VectorType(FLOAT, _LANES)
            columns = context.make_array(signature.args[0])(context, builder, args[0])
            length = builder.extract_value(columns.shape, 1)
            lines = []
            for i in range(_LANES):
                place = builder.add(args[1], builder.mul(length, LONG(i)))
                lines.append(load(builder, builder.gep(columns.data, [place]), vector, 4))
            for distance in (1, 2, 4, 8):
                lower, upper = [], []
                for lane in range(_LANES):
                    block = lane // distance % 2
                    lower.append(lane if not block else _LANES + lane - distance)
                    upper.append(lane + distance if not block else _LANES + lane)
                mixed = list(lines)
                for i in range(_LANES):
                    if not i // distance % 2:
                        pair = lines[i], lines[i + distance]
                        mixed[i] = shuffle(builder, *pair, lower)
                        mixed[i + distance] = shuffle(builder, *pair, upper)
                lines = mixed
            out = address(context, builder, signature.args[2], args[2])
            for w, line in enumerate(lines):
                cut = shuffle(builder, line, line, range(rows)) if rows < _LANES else line
                place = builder.gep(out, [builder.add(args[3], builder.mul(args[4], LONG(w)))])
                store(builder, cut, place, 4)
            return context.get_dummy_value()

        return types.void(source, word, target, start, stride), codegen

    return transpose


# --- the bodies ----------------------------------------------------------------------------------


@cache
def pack_lines(width: int, pair: int, integers: bool) -> Any:
    """A body for a source (lines, k), k contiguous; a chunk is a panel of ``width`` lines from ``first`` on.

    out: (panels, words, width).
    """
    read = _read_integers if integers else _read_floats
    groups = [(start, min(_LANES, width - start)) for start in range(0, width, _LANES)]
    transposes = tuple(_transpose(lines) for _, lines in groups)
    first_transpose, last_transpose = transposes[0], transposes[-1]
    tiles = len(groups)

    @chunked
    def lines_body(chunk, source, first, depth, bits, group, out):
        full_width()
        words = out.shape[1]
        target = out[chunk].reshape(-1)
        numbers = np.empty(AT_ONCE * pair, np.float32)
        block = np.zeros((_LANES, AT_ONCE), np.float32)
        for start in range(0, words, AT_ONCE):
            stop = min(start + AT_ONCE, words)
            k = min(stop * pair, depth)
            for tile in range(tiles):
                for i in range(min(_LANES, width - tile * _LANES)):
                    row = first + chunk * width + tile * _LANES + i
                    line = block[i]
                    filled = 0
                    if row < source.shape[0] and start * pair < k:
                        read(source, row, start * pair, k, bits, group, numbers)
                        filled = k - start * pair
                    numbers[filled : (stop - start) * pair] = f32(0)
                    for w in range(stop - start):
                        line[w] = numbers[w] if pair == 1 else _pair(numbers[2 * w], numbers[2 * w + 1])
                whole = (stop - start) // _LANES * _LANES
                for w in range(0, whole, _LANES):
                    place = (start + w) * width + tile * _LANES
                    if tile == tiles - 1:
                        last_transpose(block, w, target, place, width)
                    else:
                        first_transpose(block, w, target, place, width)
                for w in range(whole, stop - start):
                    for i in range(min(_LANES, width - tile * _LANES)):
                        target[(start + w) * width + tile * _LANES + i] = block[i, w]

    return lines_body


@cache
def pack_columns(width: int, pair: int, integers: bool) -> Any:
    """A body for a source (k, lines), lines contiguous; a chunk is some panels. out: (panels, words, width).

    scale: (k, groups) factors of the source's rows where weights are integers, else not used.
    """
    read = _read_integers if integers else _read_floats
    panels_at_once = max(1, AT_ONCE // width)

    @chunked
    def columns_body(chunk, source, first, depth, bits, group, scale, out):
        full_width()
        panels, words, _ = out.shape
        low_panel = chunk * panels_at_once
        high_panel = min(low_panel + panels_at_once, panels)
        start = first + low_panel * width
        stop = min(first + high_panel * width, source.shape[1] * (2 if integers and bits == 4 else 1))
        numbers = np.zeros((pair, panels_at_once * width), np.float32)
        for w in range(words):
            for part in range(pair):
                row = w * pair + part
                line = numbers[part]
                if row < depth:
                    read(source, row, start, stop, bits, group, line)
                    if integers:
                        position = start
                        while position < stop:
                            end = min(stop, (position // group + 1) * group)
                            factor = scale[row, position // group]
                            segment = line[position - start : end - start]
                            for j in range(end - position):
                                segment[j] *= factor
                            position = end
                else:
                    line[:] = f32(0)
            for panel in range(high_panel - low_panel):
                target = out[low_panel + panel, w]
                low = numbers[0, panel * width : (panel + 1) * width]
                high = numbers[pair - 1, panel * width : (panel + 1) * width]
                for j in range(width):
                    target[j] = low[j] if pair == 1 else _pair(low[j], high[j])

    return columns_body


def column_chunks(panels: int, width: int) -> int:
    """How many chunks ``pack_columns`` has."""
    return -(-panels // max(1, AT_ONCE // width))
