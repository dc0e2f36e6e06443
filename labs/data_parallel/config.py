"""Sizes of the data_parallel lab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from labs.lab import setting

if TYPE_CHECKING:
    from labs.models.configuration import GPTConfig

HEAD = 32  # numbers of an attention head
STRAGGLER_WIDTH, STRAGGLER_LAYERS = 32, 2


@dataclass(frozen=True)
class Config:
    """A GPT on the text of the standard library, and the straggler of the last group."""

    ranks: int = setting(2, unit="processes", help="ranks that share a batch", minimum=2, maximum=16)
    width: int = setting(
        128, quick=64, full=256, unit="numbers", help="width of the GPT; a multiple of 32", minimum=HEAD
    )
    layers: int = setting(4, quick=2, unit="blocks", help="blocks of the GPT", minimum=1, maximum=100)
    length: int = setting(64, unit="tokens", help="tokens of a sequence", minimum=1, maximum=4096)
    sequences: int = setting(4, unit="sequences", help="sequences of a step, on each rank", minimum=1)
    target_loss: float = setting(
        2.8, quick=2.9, full=2.7, unit="nats", help="validation loss to reach with stragglers", minimum=0.1
    )
    most_steps: int = setting(512, unit="steps", help="after which the target is given up", minimum=1)
    local_steps: int = setting(
        16, unit="steps", help="steps of local SGD between two averages", minimum=2, maximum=256
    )
    late_probability: float = setting(
        0.2, unit="", help="that a rank is late in a step", minimum=0.0, maximum=1.0
    )
    late_s: float = setting(0.03, unit="s", help="by how much a late rank is late", minimum=0.0, maximum=10.0)

    def __post_init__(self) -> None:
        if self.width % HEAD:
            raise ValueError(
                f"data_parallel: width={self.width} is no multiple of {HEAD}, the size of a head"
            )
        if self.most_steps < self.local_steps:
            raise ValueError(
                f"data_parallel: most_steps={self.most_steps} is below local_steps={self.local_steps}: "
                "ranks would never meet"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a step, on each rank."""
        return self.sequences * self.length

    def gpt(self) -> GPTConfig:
        """Without biases: a key's has no gradient but rounding, which Adam would make as large as any."""
        return self._gpt(self.width, self.layers)

    def small_gpt(self) -> GPTConfig:
        """The straggler's: its steps are short beside the delays."""
        return self._gpt(STRAGGLER_WIDTH, STRAGGLER_LAYERS)

    def _gpt(self, width: int, layers: int) -> GPTConfig:
        from labs.models.configuration import GPTConfig

        return GPTConfig(width=width, layers=layers, heads=width // HEAD, context=self.length, bias=False)
