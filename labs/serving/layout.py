"""Which workers there are, what each of them does, and how much memory each has."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import nearest
from labs.serving.blocks import BlockPool
from labs.serving.engine import Engine, Executor
from labs.serving.policies import chunked, prefill_first

POLICIES = ("prefill_first", "chunked", "disaggregated")
Role = str
"""``both``, ``prefill`` (reads prompts and hands them over) or ``decode`` (writes)."""


@dataclass(frozen=True)
class Layout:
    """Workers under a policy.

    workers: how many, each with ``blocks`` blocks of ``block_size`` tokens; of a disaggregated layout the
    first ``prefill`` only read. budget: tokens of a step, the chunk size of ``chunked``. most: sequences at
    once.
    """

    policy: str = "chunked"
    workers: int = 2
    prefill: int = 1
    budget: int = 64
    blocks: int = 512
    block_size: int = 16
    most: int = 64

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"there is no policy {self.policy!r}{nearest(self.policy, POLICIES)}")
        for name in ("workers", "budget", "blocks", "block_size", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.disaggregated and not 1 <= self.prefill < self.workers:
            raise ValueError(
                f"{self.prefill} prefill and {self.workers - self.prefill} decode workers: a disaggregated "
                "layout has at least 1 of each; with one worker choose --policy chunked"
            )

    @property
    def disaggregated(self) -> bool:
        return self.policy == "disaggregated"

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values fit one worker."""
        return self.blocks * self.block_size

    @property
    def roles(self) -> list[Role]:
        if not self.disaggregated:
            return ["both"] * self.workers
        return ["prefill"] * self.prefill + ["decode"] * (self.workers - self.prefill)

    def engine(self, role: Role, executor: Executor) -> Engine:
        """A worker's engine, empty."""
        return Engine(
            executor,
            BlockPool(self.blocks, self.block_size),
            chunked if self.policy == "chunked" else prefill_first,
            self.budget,
            self.most,
            hands_over=role == "prefill",
        )
