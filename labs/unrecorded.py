"""Recorders that leave out: everything, where a program runs and is not measured; or texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from labs.lab import Recorder


@dataclass(frozen=True)
class Unrecorded:
    """now: seconds, the same for all processes of the host."""

    now: Callable[[], float]

    def record(self, name: str, value: float, unit: str) -> None:
        """Nobody reads it."""

    def text(self, title: str, text: str) -> None:
        """Nobody reads it."""


class WithoutTexts:
    """The numbers of another recorder, and no texts: for what would be shown twice."""

    def __init__(self, recorder: Recorder) -> None:
        self.now, self.record = recorder.now, recorder.record

    def text(self, title: str, text: str) -> None:
        """It is shown elsewhere."""
