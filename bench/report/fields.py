"""Takes typed fields out of untrusted JSON; every complaint names the field it is about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bench.report.units import text_of

LONGEST = 2000  # letters of a text; a longer one ends with an ellipsis


class Field:
    """A value of a parsed JSON file with the path that leads to it, for messages.

    Absent and null are the same: what is optional gets its default. A value of the wrong type is a
    ValueError such as ``results: perflab.labs.roofline.seconds must be a number, not 'soon'``.
    """

    def __init__(self, value: object, path: str = "") -> None:
        self.value = value
        self.path = path

    def __bool__(self) -> bool:
        return self.value is not None

    def wrong(self, expected: str) -> ValueError:
        where = text_of(self.path, 200) or "the file"
        return ValueError(f"results: {where} must be {expected}, not {text_of(repr(self.value), 60)}")

    def mapping(self) -> Mapping[str, Any]:
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def __getitem__(self, key: str) -> Field:
        return Field(self.mapping().get(key), f"{self.path}.{key}" if self.path else key)

    def entries(self) -> Iterator[tuple[str, Field]]:
        for key in self.mapping():
            yield str(key), self[key]

    def items(self) -> Iterator[Field]:
        if self.value is None:
            return
        if not isinstance(self.value, (list, tuple)):
            raise self.wrong("a list")
        for index, value in enumerate(self.value):
            yield Field(value, f"{self.path}[{index}]")

    def text(self, default: str = "") -> str:
        if self.value is None:
            return default
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return text_of(self.value, LONGEST)

    def lines(self) -> str:
        """Text of several lines, as it is but for control characters."""
        if self.value is None:
            return ""
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return "\n".join(
            "".join(c if c.isprintable() else "    " if c == "\t" else "\ufffd" for c in line)
            for line in self.value.splitlines()
        )

    def flag(self, default: bool = False) -> bool:
        if self.value is None:
            return default
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def number(self) -> float | None:
        """A float; None for null, NaN and infinities (JSON has no way to write them)."""
        if self.value is None:
            return None
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a number")
        try:
            value = float(self.value)
        except OverflowError:
            raise self.wrong("a number below 1e308") from None
        return value if math.isfinite(value) else None

    def count(self, default: int = 0) -> int:
        value = self.number()
        if value is None:
            return default
        if value != int(value):
            raise self.wrong("a whole number")
        return int(value)

    def texts(self) -> list[str]:
        return [item.text() for item in self.items()]

    def numbers(self) -> list[float]:
        """Floats, NaN where there is none: a figure shows a gap there."""
        values = [item.number() for item in self.items()]
        return [math.nan if value is None else value for value in values]

    def plain(self) -> str:
        """A scalar of any kind as text (settings, machine facts)."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if self.value is None:
            return ""
        if isinstance(self.value, (list, tuple)):
            return ", ".join(item.plain() for item in self.items())
        if isinstance(self.value, dict):
            return ", ".join(f"{text_of(key, 100)}: {item.plain()}" for key, item in self.entries())
        return text_of(self.value, LONGEST)
