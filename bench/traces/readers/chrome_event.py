"""One event of a Chrome trace, as far as the columns need it.

The structures keep only these fields and are no concern of the garbage collector: a million events decode in
the time that parsing their JSON takes. What a stranger's file has in place of a number or a string is coerced
where that has one meaning ("3" for 3), else left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct, field

Number = float | int | str | None  # profilers write 3, 3.0 and "3"

NO_JSON = Raw(b"")


class Arguments(Struct, gc=False):
    """The last fourteen only stand beside collectives, samples of memory, labels and JAX's slices."""

    correlation: Number = -1
    device: Number = None
    bytes: Number = -1
    input_dims: Raw = field(default=NO_JSON, name="Input Dims")
    input_type: Raw = field(default=NO_JSON, name="Input type")
    name: str | None = None
    labels: str | None = None
    collective: str | None = field(default=None, name="Collective name")
    elements_in: Number = field(default=None, name="In msg nelems")
    elements_out: Number = field(default=None, name="Out msg nelems")
    dtype: str | None = None
    group: str | None = field(default=None, name="Process Group Name")
    group_description: str | None = field(default=None, name="Process Group Description")
    group_size: Number = field(default=None, name="Group size")
    allocated: Number = field(default=None, name="Total Allocated")
    allocation: Number = field(default=None, name="Bytes")
    device_type: Number = field(default=None, name="Device Type")
    device_id: Number = field(default=None, name="Device Id")
    hlo_op: str | None = None
    step_num: Number = None


class Event(Struct, gc=False):
    """ph: what it is ("X" a slice, "B" and "E" its ends, "M" a label). ts, dur: microseconds. In the order in
    which PyTorch writes them, in which they are found soonest."""

    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: Number = None
    tid: Number = None
    ts: Number = None
    dur: Number = None
    args: Arguments | None = None


class ExactEvent(Event, gc=False):
    """Microseconds since 1970 with decimals (Kineto early in 2024): a float64 is off by 100 ns and more."""

    ts: Raw = NO_JSON  # type: ignore[assignment]


Form = TypeVar("Form", bound=Struct)


def lenient(data: Any, form: type[Form], dropped: Counter[str]) -> Form | None:
    """An object of JSON, parsed by the standard library, in this form; None when it is no object.

    A field of a wrong type keeps its default and is counted.
    """
    if not isinstance(data, dict):
        dropped["events that are no objects"] += 1
        return None
    found: dict[str, Any] = {}
    for part in _fields(form):
        value = data.get(part.encode_name)
        if value is None:
            continue
        if part.name == "args" and isinstance(value, dict):
            found["args"] = lenient(value, Arguments, dropped)
        elif part.type is Raw:
            found[part.name] = Raw(json.dumps(value).encode())
        else:
            try:
                found[part.name] = msgspec.convert(printable(value), part.type, strict=False)
            except msgspec.ValidationError:
                dropped["fields of a wrong type"] += 1
    return form(**found)


@cache
def _fields(form: type[Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(form)


def printable(value: Any) -> Any:
    """Half a surrogate pair in a string cannot be written anywhere: it becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
