"""Bytes as they are written, made text: whole characters only, and nothing of a stop sequence."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Text:
    """stops: sequences at which the text ends, themselves not part of it."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops, self._held = tuple(stops), b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False

    def feed(self, token: int) -> str:
        """One more byte; the text that is certain now. Sets ``stopped`` at the end of a stop sequence."""
        self._held += bytes([token])
        for stop in self._stops:
            if self._held.endswith(stop):
                self.stopped = True
                certain, self._held = self._held[: -len(stop)], b""
                return self._decoder.decode(certain, final=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._decoder.decode(certain)

    def end(self) -> str:
        """What is left, a broken character replaced."""
        certain, self._held = self._held, b""
        return self._decoder.decode(certain, final=True)


def _overlap(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of ``text`` may be the beginning of ``stop``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
