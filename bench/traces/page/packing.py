"""Columns as text inside a page: whole numbers of any size, small where the numbers are small.

A slice in JSON costs about 60 bytes; here it costs about 14. Numbers become LEB128 (seven bits a byte, the
eighth says that more follow), those that may be negative are folded first (0, -1, 1, -2 -> 0, 1, 2, 3), and
the bytes become base64, which a page may contain as they are. ``unpack.js`` is the way back.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.report.units import text_of

_BRIEF = 60
_NO_ROOM = "(no room for this name)"
EXACT = 2**53  # beyond this a number of the page's script is no longer exact


def pack(values: np.ndarray) -> str:
    """Whole numbers from 0 to 2**53, one dimension, as base64 of LEB128. ValueError outside that range."""
    numbers = np.asarray(values)
    if len(numbers) and (numbers.min() < 0 or numbers.max() > EXACT):
        raise ValueError(f"packed numbers lie in 0 ... 2**53, not {numbers.min()} ... {numbers.max()}")
    numbers = numbers.astype(np.uint64)
    length = np.ones(len(numbers), np.int64)
    for bits in range(7, 56, 7):
        length += numbers >= np.uint64(1 << bits)
    first = np.cumsum(length) - length
    out = np.empty(int(length.sum()), np.uint8)
    rows = np.arange(len(numbers))
    for byte in range(int(length.max(initial=0))):
        rows = rows[length[rows] > byte]
        part = (numbers[rows] >> np.uint64(7 * byte)) & np.uint64(0x7F)
        more = (length[rows] > byte + 1).astype(np.uint64) << np.uint64(7)
        out[first[rows] + byte] = (part | more).astype(np.uint8)
    return base64.b64encode(out.tobytes()).decode("ascii")


def pack_signed(values: np.ndarray) -> str:
    """Whole numbers of either sign, below 2**52 in size: folded, then packed."""
    numbers = np.asarray(values, np.int64)
    return pack(np.where(numbers < 0, -2 * numbers - 1, 2 * numbers))


def data_block(value: Mapping[str, Any]) -> str:
    """JSON that may stand inside a ``<script>`` element: no letter in it can end the element or a line."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Words:
    """Texts of a page, each kept once: text -> number.

    Names come from strangers and may be a megabyte long, or a million: what stands on the page is printable,
    and cut to ``longest`` letters; shorter when half of ``room`` is used up, to nothing when all of it is.
    ``cut`` counts them.
    """

    def __init__(self, longest: int = 400, room: int = 1_600_000) -> None:
        self.longest = longest
        self.room = room
        self.texts: list[str] = []
        self.cut = 0
        self._letters = 0
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        known = self._numbers.get(text)
        if known is None:
            known = self._numbers[text] = self._added(text)
        return known

    def _added(self, text: str) -> int:
        longest = self.longest
        if self._letters > self.room / 2:
            longest = min(longest, _BRIEF)
        self.cut += len(text) > longest or self._letters > self.room
        if self._letters > self.room:
            return self._numbers.get(_NO_ROOM) or self._kept(_NO_ROOM)
        # Cut first: making a megabyte printable, letter by letter, takes a second.
        return self._kept(text_of(text[: longest + 1], longest))

    def _kept(self, text: str) -> int:
        self._letters += len(text)
        self.texts.append(text)
        self._numbers.setdefault(text, len(self.texts) - 1)
        return len(self.texts) - 1

    def numbers(self, texts: list[str]) -> np.ndarray:
        """int64 (texts,): the number of each."""
        return np.fromiter((self.number(text) for text in texts), np.int64, len(texts))
