"""Columns that grow a part at a time, and the symbol tables they refer to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np

from bench.traces.classify import classify
from bench.traces.events import Events, Kind
from bench.traces.readers.source import memory_budget

LONGEST_NS = 1 << 53
"""104 days: no recording is longer; what lies further from the others is a broken time stamp."""

ROW_BYTES = 3 * 65  # while the parts are joined and sorted, each row is there up to three times


class Codes(dict[Any, int]):
    """Gives each new symbol the next number: ``codes[symbol]``."""

    def __init__(self) -> None:
        self.bytes = 0

    def __missing__(self, symbol: Hashable) -> int:
        self[symbol] = code = len(self)
        self.bytes += 150 + (len(symbol) if isinstance(symbol, str | bytes) else 0)
        return code


class Columns:
    """Collects parts of the columns of ``Events``; ``category`` stands in for ``kind`` until the end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names, self.categories, self.shapes, self.groups = Codes(), Codes(), Codes(), Codes()
        self.dropped: Counter[str] = Counter()
        self.unclassified: Counter[str] = Counter()
        self.used_names: list[str] = []
        self._parts: list[dict[str, np.ndarray]] = []
        self._rows = 0
        self._budget = memory_budget()

    def __len__(self) -> int:
        return self._rows

    def add(self, **columns: np.ndarray) -> None:
        """Rows of equal length; ``start`` in nanoseconds of any origin. ValueError: memory runs out."""
        self._parts.append(columns)
        self._rows += len(columns["start"])
        text = sum(codes.bytes for codes in (self.names, self.categories, self.shapes, self.groups))
        if self._rows * ROW_BYTES + text > self._budget:
            raise ValueError(
                f"{self.path} holds more than {self._rows:,} slices, which do not fit into the memory that "
                f"is free ({self._budget >> 20} MiB for one report); record fewer steps"
            )

    def finish(
        self,
        recognise: Callable[[str, str], Kind] = classify,
        lane_codes: np.ndarray | None = None,
        left_out: Sequence[str] = (),
    ) -> tuple[Events, int]:
        """The events, and the nanosecond at which the first starts: their origin.

        recognise: the kind of a category and a name. lane_codes: what becomes of each code of a lane.
        left_out: categories that are no part of what was recorded, counted as dropped.
        """
        wanted = {name for part in self._parts for name in part} | {"start", "duration", "name", "lane"}
        whole = {}
        for name in wanted:
            parts = [
                part[name] if name in part else np.full(len(part["start"]), Events.MISSING[name])
                for part in self._parts
            ]
            whole[name] = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self._parts.clear()
        category = whole.pop("category", np.zeros(self._rows, np.int32))
        for word in left_out:
            if word in self.categories:
                kept = category != self.categories[word]
                self.dropped[f"spans of the profiler itself (category {word})"] += int((~kept).sum())
                category = category[kept]
                whole = {name: values[kept] for name, values in whole.items()}
        if lane_codes is not None:
            whole["lane"] = lane_codes[whole["lane"]]
        whole["kind"] = self._kinds(category, whole["name"], recognise)
        near = self._near(whole["start"])
        if not near.all():
            self.dropped["slices more than 52 days from the others"] += int((~near).sum())
            whole = {name: values[near] for name, values in whole.items()}
        whole["name"], used = used_codes(whole["name"], len(self.names))
        self.used_names = [name for name, kept in zip(self.names, used, strict=True) if kept]
        origin = int(whole["start"].min()) if len(whole["start"]) else 0
        whole["start"] = whole["start"] - origin
        return Events.of(**whole), origin

    def _near(self, start: np.ndarray) -> np.ndarray:
        if not len(start) or int(start.max()) - int(start.min()) < LONGEST_NS:
            return np.ones(len(start), bool)
        middle = np.partition(start, len(start) // 2)[len(start) // 2]
        return np.abs(start // 2 - middle // 2) < LONGEST_NS // 4

    def _kinds(
        self, category: np.ndarray, name: np.ndarray, recognise: Callable[[str, str], Kind]
    ) -> np.ndarray:
        """int8 (rows,): every pair of a category and a name is looked at once."""
        if not len(name):
            return np.empty(0, np.int8)
        pairs = category.astype(np.int64) * (len(self.names) + 1) + name
        unique, counts = np.unique(pairs, return_counts=True)
        names, categories = list(self.names), list(self.categories) or [""]
        kinds = np.empty(len(unique), np.int8)
        for index, (pair, count) in enumerate(zip(unique.tolist(), counts.tolist(), strict=True)):
            of_category, of_name = divmod(pair, len(self.names) + 1)
            kinds[index] = kind = recognise(categories[of_category], names[of_name])
            if kind is Kind.UNCLASSIFIED:
                self.unclassified[categories[of_category] or names[of_name]] += count
        return kinds[np.searchsorted(unique, pairs)]


def used_codes(codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes without gaps, and which of the ``count`` old ones occur."""
    used = np.bincount(codes, minlength=count) > 0
    return (np.cumsum(used) - 1)[codes], used


def nanoseconds(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """int64 nanoseconds of microseconds, and which of them are a time (finite, within 146 years of 0).

    Exact to the nanosecond: of a float64 below 2^43 the part before the point is converted by itself, a
    number in JSON digit by digit. Numbers in strings count as numbers.
    """
    if values and isinstance(values[0], msgspec.Raw):
        return _exact_nanoseconds(values)
    try:
        microseconds = np.array(values)
    except OverflowError:
        microseconds = np.array(values, object)
    if microseconds.dtype.kind not in "if":
        microseconds = np.array([number(value) for value in values], np.float64)
    limit = float(1 << 62) / 1000
    if microseconds.dtype.kind == "i":
        valid = (microseconds < limit) & (microseconds > -limit)
        return np.where(valid, microseconds, 0) * 1000, valid
    with np.errstate(invalid="ignore"):
        valid = np.abs(microseconds) < limit
    microseconds = np.where(valid, microseconds, 0)
    whole = np.floor(microseconds)
    rest = np.rint((microseconds - whole) * 1000)
    return whole.astype(np.int64) * 1000 + rest.astype(np.int64), valid


def _exact_nanoseconds(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    found, valid = np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    for index, text in enumerate(values):
        try:
            digits = bytes(text).decode() if isinstance(text, msgspec.Raw) else str(text)
            exact = Decimal(digits.strip('"'))
            if abs(exact) < (1 << 62) // 1000:  # NaN is never less
                found[index], valid[index] = int((exact * 1000).to_integral_value()), True
        except (ArithmeticError, ValueError):
            continue
    return found, valid


def integers(values: list[Any], missing: int = -1) -> np.ndarray:
    """int64 of numbers, also in strings; ``missing`` for what is none, or does not fit."""
    try:
        return np.array(values, np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.array([integer(value, missing) for value in values], np.int64)


def integer(value: Any, missing: int = -1) -> int:
    """Exact where it is an integer, cut off where it is a fraction."""
    if isinstance(value, int):
        return value if abs(value) < 1 << 62 else missing
    found = number(value)
    return int(found) if abs(found) < 1 << 62 else missing


def number(value: Any) -> float:
    """A number, also one in a string or in JSON; NaN for what is none."""
    try:
        return float(bytes(value) if isinstance(value, msgspec.Raw) else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
