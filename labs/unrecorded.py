"""A recorder that keeps nothing: for what runs as a program and is not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unrecorded:
    """now: seconds, the same for all processes of the host."""

    now: Callable[[], float]

    def record(self, name: str, value: float, unit: str) -> None:
        """Nobody reads it."""

    def text(self, title: str, text: str) -> None:
        """Nobody reads it."""
