"""Sizes of the attention lab."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting


@dataclass(frozen=True)
class Config:
    """One layer of a small model. Lengths are a quarter, a half and all of ``length``."""

    length: int = setting(
        2048, quick=1024, full=4096, unit="tokens", help="longest sequence", minimum=16, maximum=2**17
    )
    heads: int = setting(8, unit="heads", help="query heads; a multiple of 4", minimum=4)
    dim: int = setting(64, unit="numbers", help="size of a head", minimum=8, maximum=256)
    window: int = setting(128, unit="tokens", help="keys that a query sees in the sliding window", minimum=1)
    sequences: int = setting(
        4, quick=4, full=16, unit="sequences", help="sequences that get a token", minimum=1
    )
    block: int = setting(16, unit="tokens", help="tokens in a page of the cache", minimum=1)

    def __post_init__(self) -> None:
        if self.heads % 4:
            raise ValueError(
                f"attention: heads={self.heads} is not a multiple of 4, as one key and value head serves four"
            )

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.length // 4, self.length // 2, self.length

    @property
    def shared_heads(self) -> int:
        """Key and value heads under GQA: one for four query heads."""
        return self.heads // 4
