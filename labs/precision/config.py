"""Sizes of the precision lab."""

from __future__ import annotations

from dataclasses import dataclass, replace

from labs.lab import setting
from labs.models.configuration import GPTConfig
from labs.models.trained import RECIPES, Recipe, chosen
from labs.precision.sizes import matrices

LEAST_BYTES = 1.0e9  # of the large model in float32
PARTS = ("gpt", "student", "alone", "adapters", "tuned", "exit")
"""What is trained, each kept in a file of its own: the model, and what ``training.py`` makes of it."""
CACHES = 16  # last-level caches that it is, so that an eighth of it still is two
MEMORY = 8  # of the memory it is this part at most, as the forms of a group, held together, are three of it


@dataclass(frozen=True)
class Config:
    """Quality is judged on a small trained model, speed on a large one of random weights."""

    model: str = setting(
        "kept",
        unit="",
        help="the trained one: kept (make model's, else short), or a recipe by name",
        choices=("kept", *RECIPES),
    )
    windows: int = setting(
        256,
        quick=48,
        full=1024,
        unit="windows",
        help="held-out text, each as long as the context",
        minimum=2,
        maximum=4096,
    )
    tokens: int = setting(
        48, quick=32, unit="tokens", help="decoded for each prompt, speculatively", minimum=1
    )
    prompts: int = setting(8, quick=4, full=32, unit="prompts", help="prompts that are continued", minimum=1)
    lookahead: int = setting(3, unit="tokens", help="proposals of a speculative round", minimum=1, maximum=16)
    width: int = setting(
        1920, unit="numbers", help="width of the large model; a multiple of 128", minimum=128
    )
    layers: int = setting(
        0,
        unit="blocks",
        help="of the large model, even; 0: 1 GB of float32, more where caches and memory are large",
        minimum=0,
    )
    prompt: int = setting(128, unit="tokens", help="tokens of a prompt that one block computes", minimum=1)
    sequences: int = setting(8, unit="sequences", help="sequences that share a step of the cache", minimum=1)
    context: int = setting(8192, unit="tokens", help="tokens in the cache of each", minimum=64)
    limit: float = setting(
        25.0, quick=20.0, full=60.0, unit="s", help="for training, where make model has not run", minimum=1.0
    )

    def __post_init__(self) -> None:
        if self.width % 128:
            raise ValueError(
                f"precision: width={self.width} is no multiple of 128 (heads of 64, and half of them)"
            )
        context = self.recipe.model.context
        if self.tokens >= context:
            raise ValueError(
                f"precision: tokens={self.tokens} leaves no room for a prompt in the {context} tokens of the "
                f"{self.model} model; at most {context - 1} can be decoded"
            )
        if self.layers % 2:
            raise ValueError(
                f"precision: layers={self.layers} is odd, and forms of half the blocks are compared"
            )

    @property
    def recipe(self) -> Recipe:
        """Of the trained model."""
        return chosen(self.model, PARTS)

    @property
    def large(self) -> GPTConfig:
        """The model whose speed is measured."""
        from labs.calibration_facts import caches, memory_bytes

        model = GPTConfig(width=self.width, heads=self.width // 64, layers=1, context=64)
        block = 4.0 * sum(matrix.numbers for matrix in matrices(model))
        least = min(max(LEAST_BYTES, CACHES * caches().get("l3_bytes", 0.0)), memory_bytes() / MEMORY)
        layers = self.layers or 2 * max(1, -(-int(least) // int(2 * block)))
        return GPTConfig(width=self.width, heads=self.width // 64, layers=layers, context=64)

    @property
    def block(self) -> GPTConfig:
        """One block of it, that computes a prompt."""
        return replace(self.large, layers=1, context=self.prompt)

    @property
    def cache_heads(self) -> int:
        """Key and value heads of 128 numbers in the cache group."""
        return 4
