"""What a training run can be asked for, checked."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from labs.lab import nearest
from labs.models.configuration import GPTConfig
from labs.models.text import VOCABULARY

STRATEGIES = (
    *("single", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "context", "expert"),
    *("local_sgd", "diloco"),
)
BACKENDS = ("gloo", "shm", "nccl")


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """ValueError for what cannot be run, before anything is started."""

    strategy: str = option("ddp", "how the ranks share the work", STRATEGIES)
    backend: str = option("gloo", "what carries the messages; nccl is for CUDA devices", BACKENDS)
    steps: int = option(20, "steps in all, those before a resumed checkpoint included")
    batch: int = option(8, "sequences of a step, of all ranks together")
    length: int = option(64, "tokens (bytes of text) of a sequence")
    width: int = option(128, "numbers that stand for a token between blocks")
    layers: int = option(4, "blocks of the model")
    heads: int = option(4, "attention heads")
    experts: int = option(4, "experts of a block (expert)")
    local_steps: int = option(4, "steps between two averages (local_sgd, diloco)")
    shard_size: int = option(0, "ranks that share one copy of the parameters (hsdp; 0: half of the ranks)")
    learning_rate: float = option(1e-3, "of AdamW")
    seed: int = option(0, "of the model's initial values and the batches")
    checkpoint: str = option("", "folder of checkpoints; empty: none are written")
    save_every: int = option(10, "steps between two checkpoints; the last step is always saved")
    background_save: bool = option(False, "write checkpoints while the training goes on, from a copy")
    resume: bool = option(False, "go on from the newest checkpoint in the folder, if there is one")
    join_timeout: float = option(60.0, "seconds that a rank waits for the others to start")
    timeout: float = option(60.0, "seconds that a rank waits for the others in a step")

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = item.metadata["choices"]
            value = getattr(self, item.name)
            if choices and value not in choices:
                raise ValueError(f"--{item.name} {value!r} is unknown{nearest(str(value), choices)}")
        for name in ("batch", "length", "width", "layers", "heads", "experts", "local_steps", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it is at least 1")
        if self.steps < 0 or self.seed < 0 or self.shard_size < 0:
            raise ValueError("--steps, --seed and --shard-size are not negative")
        if self.learning_rate <= 0 or self.join_timeout <= 0 or self.timeout <= 0:
            raise ValueError("--learning-rate, --join-timeout and --timeout are above 0")
        if self.resume and not self.checkpoint:
            raise ValueError("--resume goes on from a checkpoint: say where with --checkpoint DIR")
        if self.background_save and not self.checkpoint:
            raise ValueError("--background-save writes checkpoints: say where with --checkpoint DIR")
        if self.checkpoint and Path(self.checkpoint).exists() and not Path(self.checkpoint).is_dir():
            raise ValueError(f"--checkpoint {self.checkpoint} is a file; it has to be a folder")
        self.model()

    def model(self) -> GPTConfig:
        return GPTConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            context=self.length,
            vocabulary=VOCABULARY,
        )


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse(arguments: list[str] | None = None) -> Options:
    """The options on a command line; a wrong one ends the process with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m labs.train",
        description="Train a GPT on the source of the running Python's standard library.",
    )
    add_to(parser)
    given = vars(parser.parse_args(arguments))
    try:
        return Options(**given)
    except ValueError as error:
        parser.error(str(error))


def add_to(parser: argparse._ActionsContainer) -> None:
    """The options as arguments of a command."""
    for item in fields(Options):
        assert item.default is not MISSING
        help = f"{item.metadata['help']} (default {item.default!r})"
        if item.default is False:
            parser.add_argument(flag(item.name), action="store_true", help=item.metadata["help"])
        else:
            metavar = "|".join(item.metadata["choices"]) or item.name.upper()
            parser.add_argument(
                flag(item.name), type=type(item.default), default=item.default, metavar=metavar, help=help
            )
