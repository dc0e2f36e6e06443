"""What ranks have to agree on, as numbers in the headers of slots and as words in errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ALL_REDUCE, BROADCAST, REDUCE, ALL_GATHER, GATHER, SCATTER, REDUCE_SCATTER, ALL_TO_ALL, BARRIER = range(9)
_NAMES = [
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "gather",
    "scatter",
    "reduce_scatter",
    "all_to_all",
    "barrier",
]
DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
DTYPES = sorted(dict.fromkeys(DTYPES), key=str)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_OPERATIONS = ["SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def amounts(tensors: Sequence[torch.Tensor]) -> str:
    """Such as "3 + 5 float32"."""
    if len(tensors) > 4:
        return f"{len(tensors)} tensors"
    kinds = " and ".join(dict.fromkeys(dtype_name(tensor.dtype) for tensor in tensors))
    return f"{' + '.join(str(tensor.numel()) for tensor in tensors)} {kinds}"


def header_of(what: int, dtype: torch.dtype, reduce: str = "", root: int = 0) -> int:
    """What all ranks have to agree on, beside the number of elements."""
    code = 1 + _OPERATIONS.index(reduce) if reduce else 0
    return what | _CODES[dtype] << 8 | code << 16 | root << 24


def spelled(signature: int, count: int, names: Sequence[int]) -> str:
    what, dtype = signature & 0xFF, DTYPES[signature >> 8 & 0xFF]
    code, root = signature >> 16 & 0xFF, signature >> 24
    if what == BARRIER:
        return "barrier"
    text = _NAMES[what] + (f" {_OPERATIONS[code - 1]}" if code else "")
    text += f" of {count} {dtype_name(dtype)}" if what != ALL_TO_ALL else f" of {dtype_name(dtype)}"
    ends = {BROADCAST: "from", SCATTER: "from", REDUCE: "to", GATHER: "to"}
    return text + (f" {ends[what]} rank {names[root]}" if what in ends else "")


def message_word(tensor: torch.Tensor) -> int:
    """The bytes and the dtype of a message, as its header says them."""
    return tensor.numel() * tensor.element_size() << 8 | _CODES[tensor.dtype]


def reduction_of(opts: Any) -> tuple[str, float]:
    """(name, factor) of the ReduceOp in torch's options."""
    if opts is None:
        return "SUM", 1.0
    kind, factor = opts.reduceOp.__getstate__()
    return kind.name, 1.0 if factor is None else float(factor)


def checked_rank(rank: int, size: int) -> int:
    if not 0 <= rank < size:
        raise ValueError(f"shm: rank {rank} is not in a group of {size} ranks")
    return rank
