"""The text that labs train on: the source of the running Python's standard library, as bytes.

It is real text, some ten million bytes, on every machine. A token is a byte. A file belongs to the validation
text by its name alone, so that nothing of it is seen in training and both stay the same when others come.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import torch

VOCABULARY = 256
"""Tokens: the bytes. Byte 0 ends each file; source text has none."""

VALIDATION_SHARE = 0.1

NOT_THE_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "lib2to3", "idlelib")
"""Folders left out: installed packages, and parts that some distributions do not install."""


@dataclass(frozen=True)
class Text:
    """Both parts as uint8 tensors, and the files each consists of, relative to the library's folder."""

    train: torch.Tensor
    validation: torch.Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


@cache
def standard_library(folder: Path | None = None) -> Text:
    """The source files below ``folder`` (the standard library's), sorted by name, split by file.

    ValueError where there are not at least one file of each part.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    names = sorted(_sources(folder))
    parts: tuple[list[str], list[str]] = ([], [])
    for name in names:
        parts[_is_validation(name)].append(name)
    if not all(parts):
        raise ValueError(
            f"{folder} holds {len(names)} Python source files, too few to train and to validate; is the "
            "standard library installed as source?"
        )
    train, validation = (_joined(folder, part) for part in parts)
    return Text(train, validation, tuple(parts[0]), tuple(parts[1]))


def _joined(folder: Path, names: list[str]) -> torch.Tensor:
    content = bytearray(b"".join((folder / name).read_bytes() + b"\0" for name in names))
    return torch.frombuffer(content, dtype=torch.uint8)


def _sources(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_THE_LIBRARY]  # not entered
        here = Path(place).relative_to(folder)
        yield from ((here / name).as_posix() for name in files if name.endswith(".py"))


def _is_validation(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


class Batches:
    """Random windows of a text, the same for a seed and step whatever the number of ranks.

    ``batches[step]`` is (inputs, targets), int64 of (batch / world_size, length), targets one byte further.
    A step is drawn by itself: a resumed run needs no replay. The ranks' shares, one after the other, are the
    batch that a single process would have. Iterating gives step 0, 1, ... without end.
    """

    def __init__(
        self, text: torch.Tensor, batch: int, length: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch < 1 or length < 1:
            raise ValueError(f"batch={batch} sequences of length={length}: both must be at least 1")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of world_size={world_size}: it is from 0 to below it")
        if batch % world_size:
            raise ValueError(
                f"batch={batch} sequences cannot be shared equally by {world_size} ranks; take "
                f"{max(batch // world_size, 1) * world_size} or {(batch // world_size + 1) * world_size}"
            )
        if len(text) < length + 1:
            raise ValueError(
                f"the text has {len(text)} bytes; windows of length={length} and the byte that follows need "
                f"{length + 1}"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} is negative")
        self.text, self.batch, self.length, self.seed = text, batch, length, seed
        share = batch // world_size
        self.rows = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step < 0:
            raise IndexError(f"step={step}; the first is 0")
        generator = numpy.random.default_rng((self.seed, step))
        starts = torch.from_numpy(generator.integers(len(self.text) - self.length, size=self.batch))
        places = starts[self.rows, None] + torch.arange(self.length + 1)
        windows = self.text[places].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        step = 0
        while True:
            yield self[step]
            step += 1
