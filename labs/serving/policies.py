"""Which tokens a step computes: whole prompts first, or pieces of prompts beside every decode.

A policy sees the sequences whose prompt is being read and those that write, both in order of arrival, and
returns the work of one step. Disaggregated workers need no policy of their own: one that only reads has
nobody who writes, one that only writes has nothing to read.

Sources: Yu et al. 2022, "Orca", section 3.1 (a batch is put together anew in each step); Kwon et al. 2023
(prompts first); Agrawal et al. 2024, "Sarathi-Serve", section 4.2 (chunks in mixed batches that stall
nobody); Zhong et al. 2024, "DistServe", section 4 (disaggregated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from labs.serving.request import Request


@dataclass(eq=False)
class Running:
    """A sequence in the engine. tokens: read and written so far. computed: how many of them have their keys
    and values in ``blocks``, of which the first ``published`` are known to others."""

    request: Request
    arrived: float
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be written."""
        return len(self.tokens) - self.computed

    @property
    def written(self) -> int:
        return len(self.tokens) - len(self.request.prompt) + self.request.written


@dataclass(frozen=True)
class Work:
    """Tokens ``start`` to ``start + count`` of a sequence, all before them being computed."""

    running: Running
    start: int
    count: int

    @property
    def writes(self) -> bool:
        """Whether the next token follows from it."""
        return self.start + self.count == len(self.running.tokens)


Policy = Callable[[Sequence[Running], Sequence[Running], int], list[Work]]


def prefill_first(reading: Sequence[Running], writing: Sequence[Running], budget: int) -> list[Work]:
    """Whole prompts while they fit ``budget`` tokens, the first one always; a decode of all if there are
    none."""
    works: list[Work] = []
    left = budget
    for running in reading:
        if works and running.missing > left:
            break
        works.append(Work(running, running.computed, running.missing))
        left -= running.missing
    return works or [Work(running, running.computed, running.missing) for running in writing]


LEAST_CHUNK = 16
"""Tokens of a prompt that are read even if those who write have used up the budget: nobody starves."""


def chunked(reading: Sequence[Running], writing: Sequence[Running], budget: int) -> list[Work]:
    """A decode of all who write, and as much of the prompts as ``budget`` tokens leave room for, in one
    batch."""
    works = [Work(running, running.computed, running.missing) for running in writing]
    left = max(budget - len(works), min(budget, LEAST_CHUNK))
    for running in reading:
        count = min(left, running.missing)
        if count < 1:
            break
        works.append(Work(running, running.computed, count))
        left -= count
    return works
