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
        self._jobs = 0
        self._before: Value

    def enter(self) -> None:
        if not self._jobs:
            self._before = self._read()
        self._jobs += 1

    def leave(self) -> None:
        self._jobs -= 1
        if not self._jobs:
            self._write(self._before)
