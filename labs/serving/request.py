"""What is asked of the engine and what it answers: requests, tokens, hand-overs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Request:
    """Tokens to read and how many to write.

    number: of this request alone. output: the most tokens written, ``stop`` among them ends it earlier.
    temperature: 0 takes the likeliest token; above, a token is drawn with noise that depends on ``seed`` and
    the token's place alone, so that a request which is tried again elsewhere writes the same.
    written: how many tokens at the end of ``prompt`` were written already, by a worker that was lost.
    """

    number: int
    prompt: tuple[int, ...]
    output: int
    stop: frozenset[int] = frozenset()
    temperature: float = 0.0
    seed: int = 0
    written: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; there must be at least 1 token to start from")
        if self.output < 1:
            raise ValueError(f"output={self.output} tokens; a request writes at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")

    @property
    def total(self) -> int:
        """Tokens at its end, read and written."""
        return len(self.prompt) - self.written + self.output

    def after(self, tokens: Sequence[int]) -> Request:
        """What is left of it when ``tokens`` have been written: they are read again, the rest is written."""
        return replace(self, prompt=self.prompt + tuple(tokens), written=self.written + len(tokens))


@dataclass(frozen=True)
class Token:
    """A token was written. place: 0 for the request's first. finished: "", "length" or "stop"."""

    number: int
    token: int
    place: int
    finished: str = ""


@dataclass(frozen=True)
class HandOver:
    """A prompt has been read and its first token written: keys and values leave for another worker.

    request: with that token behind its prompt. payload: what the executor exported.
    """

    request: Request
    payload: Any
    size_bytes: int


Event = Token | HandOver
