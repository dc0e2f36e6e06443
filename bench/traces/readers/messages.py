"""How many bytes a collective moves, from what PyTorch writes beside it."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from bench.traces.readers.chrome_event import Arguments
from bench.traces.readers.columns import number

ELEMENT_BYTES = {
    # c10::ScalarType, as in a collective's "dtype", and C++'s names, as in "Input type"
    **dict.fromkeys(("double", "long", "long int", "complexfloat", "c10::complex<float>", "uint64"), 8),
    **dict.fromkeys(("float", "int", "uint32", "complexhalf"), 4),
    **dict.fromkeys(("half", "bfloat16", "short", "short int", "c10::half", "c10::bfloat16", "uint16"), 2),
    **dict.fromkeys(("byte", "char", "bool", "unsigned char", "signed char"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("c10::float8_e4m3fn", "c10::float8_e5m2", "c10::float8_e4m3fnuz"), 1),
    **dict.fromkeys(("complexdouble", "c10::complex<double>"), 16),
}


def message_bytes(arguments: Arguments) -> int:
    """The larger of what goes in and what comes out, as nccl-tests counts: of an all-gather the whole result,
    of a reduce-scatter the whole input. -1 where the file does not say."""
    if arguments.dtype is not None:
        elements = max(number(arguments.elements_in), number(arguments.elements_out))
        return _whole(elements * ELEMENT_BYTES.get(arguments.dtype.lower(), math.nan))
    try:
        shapes = msgspec.json.decode(arguments.input_dims, type=list[Any])
        types = msgspec.json.decode(arguments.input_type, type=list[str])
    except msgspec.DecodeError:
        return -1
    found = [
        math.prod(shape) * ELEMENT_BYTES.get(kind.lower(), math.nan)
        for shape, kind in zip(shapes, types, strict=False)
        if shape and isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    ]
    return _whole(math.fsum(found)) if found else -1


def _whole(value: float) -> int:
    return int(value) if 0 <= value < 1 << 62 else -1
