"""The size of the training job and of the faults planted in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from labs.lab import setting

if TYPE_CHECKING:
    from labs.models.configuration import GPTConfig


@dataclass(frozen=True)
class Config:
    width: int = setting(320, unit="numbers", help="of a token's state", quick=256, minimum=16, maximum=4096)
    layers: int = setting(2, unit="blocks", help="of the GPT", minimum=1, maximum=48)
    heads: int = setting(4, unit="heads", help="of attention", minimum=1, maximum=64)
    sequences: int = setting(8, unit="sequences", help="of a step", minimum=2, maximum=1024)
    length: int = setting(128, unit="tokens", help="of a sequence", minimum=8, maximum=8192)
    seed: int = setting(0, unit="", help="of parameters and batches", minimum=0)
    profiled: int = setting(5, unit="steps", help="in each recorded profile", minimum=5, maximum=100)
    read_ms: float = setting(
        8.0, unit="ms", help="input: a sequence takes so long to arrive", minimum=0.0, maximum=1000.0
    )
    python_passes: int = setting(
        3, unit="passes", help="python: entropies of all predictions computed in Python", minimum=1
    )
    pieces: int = setting(
        16, unit="pieces", help="dispatch: a step is divided into so many tiny batches", minimum=2
    )
    threads: int = setting(8, unit="threads", help="oversubscription: on each core", minimum=2, maximum=64)
    spare: float = setting(
        1.0, unit="x", help="memory_capacity: room, in what a step needs", minimum=1.0, maximum=100.0
    )
    uneven: int = setting(
        7, unit="x", help="straggler: one rank's share of a step over another's", minimum=2, maximum=64
    )
    ranks: int = setting(2, unit="processes", help="of communication and straggler", minimum=2, maximum=64)

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width={self.width} is no multiple of {4 * self.heads}: of heads={self.heads} heads, and of "
                "those of a model that is a quarter as wide"
            )
        if self.sequences * self.length % self.pieces or self.tokens // self.pieces < 2:
            raise ValueError(
                f"pieces={self.pieces} must divide the {self.tokens} tokens of a step into 2 tokens or more"
            )
        if self.length % self.piece_length:
            raise ValueError(
                f"pieces={self.pieces}: of {self.length} tokens a sequence, {self.piece_length} are no part"
            )

        if self.sequences < self.ranks or max(self.shares()) <= max(self.shares(uneven=False)):
            raise ValueError(
                f"sequences={self.sequences} are too few for ranks={self.ranks} of which one has "
                f"uneven={self.uneven} times as many as another: it would have no more than by equal shares; "
                f"{2 * self.ranks} or more can be divided so"
            )

    def shares(self, uneven: bool = True) -> list[int]:
        """Sequences of each rank."""
        from labs.bottlenecks.ranks import shares

        return shares(self.sequences, self.ranks, self.uneven if uneven else 1)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def piece_length(self) -> int:
        """Tokens of a sequence of a tiny batch: a part of one sequence."""
        return max(1, self.tokens // self.pieces)

    def gpt(self) -> GPTConfig:
        from labs.models.configuration import GPTConfig
        from labs.models.text import VOCABULARY

        return GPTConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            context=self.length,
            vocabulary=VOCABULARY,
        )
