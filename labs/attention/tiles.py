"""Which pairs of a query and a key a fused kernel computes: whole tiles, of which a mask may hide a part.

torch's ``cpu_flash_attention`` (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, ``q_split_size`` and
``kv_split_size``) takes up to 256 queries with up to 512 keys; under a causal mask it stops after the tile
with the last key that a block of queries sees. Ours (``kernels/attention/cpu_forward.py``) takes 48 queries
with 256 keys at 16 lanes, and leaves out what six queries do not see, up to whole vectors and panels.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 6  # kernels.tiles.ROWS: queries that our product takes at once
QUERIES = 8 * ROWS  # kernels.attention.cpu_forward.QUERIES
PANELS = 4  # of keys in one of our tiles: kernels.attention.cpu_forward.KEYS


@dataclass(frozen=True)
class Tiles:
    """Of one head.

    scores, values: pairs in the products with the keys and with the values. weights: pairs in the softmax.
    rows: of all tiles; each has a maximum and a sum of its own. tile: pairs of a whole tile.
    """

    scores: int
    values: int
    weights: int
    rows: int
    tile: int


def library(queries: int, keys: int, causal: bool) -> Tiles:
    """Of torch's kernel."""
    block = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    width = min(keys, 512)
    pairs = rows = 0
    for start in range(0, queries, block):
        count = min(block, queries - start)
        for first in range(0, min(start + count, keys) if causal else keys, width):
            pairs += count * min(width, keys - first)
            rows += count
    return Tiles(pairs, pairs, pairs, rows, block * width)


def panel(lanes: int) -> int:
    """Keys of one product of ours: kernels.tiles.PANEL. AVX2 has half as many registers as the others."""
    return lanes * (2 if lanes == 8 else 4)


def own(length: int, lanes: int, causal: bool = False, window: int = 0) -> Tiles:
    """Of our kernel; a window (causal too) of 0 keys is none."""
    wide = panel(lanes)
    keys = PANELS * wide
    scores = values = weights = rows = 0
    for start in range(0, length, ROWS):
        count = min(ROWS, length - start)
        first = max(0, start - window + 1) if window else 0
        last = start + count if causal or window else length
        block = start // QUERIES * QUERIES
        origin = _down(max(0, block - window + 1), wide) if window else 0
        scores += ROWS * (_up(last, lanes) - _down(first, wide))
        values += ROWS * (last - first)
        weights += count * (_up(last, lanes) - _down(first, lanes))
        rows += count * (_up(last - origin, keys) - _down(first - origin, keys)) // keys
    seen = min(length, window + QUERIES) if window else length
    return Tiles(scores, values, weights, rows, min(QUERIES, length) * min(keys, seen))


def _down(number: int, multiple: int) -> int:
    return number // multiple * multiple


def _up(number: int, multiple: int) -> int:
    return _down(number + multiple - 1, multiple)
