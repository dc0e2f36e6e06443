"""Sizes of the roofline lab's operations."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting
from labs.machine import sheet_names


@dataclass(frozen=True)
class Config:
    """Sizes. The cache-sized vectors fit in a few MiB; the large ones should exceed the last-level cache."""

    cache_elements: int = setting(
        2**18, unit="elements", help="length of the cache-sized vectors", minimum=1024
    )
    memory_elements: int = setting(
        2**24,
        quick=2**23,
        full=2**26,
        unit="elements",
        help="length of the memory-sized vectors",
        minimum=1024,
    )
    rows: int = setting(
        8192, full=32768, unit="rows", help="rows of 1024 in the row-wise operations", minimum=1
    )
    matvec: int = setting(
        4096, full=8192, unit="rows", help="rows and columns of the matrix times a vector", minimum=1
    )
    matrix: int = setting(
        2048, quick=1024, full=4096, unit="rows", help="size of the large product", minimum=16
    )
    versus: str = setting(
        "h200", unit="sheet", help="GPU to predict for where none is at hand", choices=tuple(sheet_names())
    )
