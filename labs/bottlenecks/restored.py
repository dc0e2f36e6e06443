"""What belongs to the process and not to a job, while several jobs change it by turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Restored(Generic[Value]):
    """Read when the first of several jobs enters, written again when the last one leaves, in whatever order
    they end."""

    def __init__(self, read: Callable[[], Value], write: Callable[[Value], object]) -> None:
        self._read, self._write = read, write
        self._inside: list[Value] = []

    def enter(self) -> None:
        self._inside.append(self._inside[0] if self._inside else self._read())

    def leave(self) -> None:
        before = self._inside.pop()
        if not self._inside:
            self._write(before)
