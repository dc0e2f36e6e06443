"""Sizes of the programming models lab."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting


@dataclass(frozen=True)
class Config:
    """Small networks, where a call costs as much as its work; a chain that grows past the second cache."""

    elements: int = setting(
        2**20, unit="numbers", help="chain: the longest array", full=2**23, minimum=2**18, maximum=2**28
    )
    batch: int = setting(32, unit="rows", help="training step: examples", minimum=1, maximum=2**16)
    width: int = setting(64, unit="numbers", help="training step and block: width", minimum=8, maximum=4096)
    steps: int = setting(32, unit="steps", help="RNN: length of the loop", quick=24, minimum=2, maximum=512)
    tokens: int = setting(
        16, unit="tokens", help="block: length of the sequence; longer ones share products between cores",
        minimum=1, maximum=4096,
    )  # fmt: skip
    shapes: int = setting(10, unit="shapes", help="new shapes: different lengths", minimum=2, maximum=64)

    def __post_init__(self) -> None:
        if self.width % HEADS:
            raise ValueError(
                f"programming_models: width={self.width} is not a multiple of {HEADS}, the heads of the block"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the chain's arrays: all overhead, half and half, in the second cache, past it."""
        return 2**8, 2**14, 2**16, self.elements


HEADS = 4
ROWS, HIDDEN = 4, 32  # of the RNN's state
