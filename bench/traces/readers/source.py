"""A report as a stream of bytes: unzipped while it is read, never more than one piece of it in memory.

Reports come from strangers. What expands without end (a gzip bomb) is stopped by its ratio, what would not
fit into memory by a budget, each with an error that says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

PIECE = 1 << 19
LARGEST_RATIO = 400  # a real trace expands 10 to 60 times, gzip's limit is 1032
UNSUSPECTED = 1 << 28  # bytes that a report may expand to whatever its ratio
SHARE_OF_MEMORY = 0.5


class DamagedArchive(ValueError):
    """A zipped file that cannot be unzipped."""


class Source:
    """An open report. ``path`` is as the user gave it, ``offset`` counts the (unzipped) bytes read."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.offset = 0
        self.zipped = False
        try:
            if not os.path.isfile(path):  # a pipe or a device could be waited for without end
                raise ValueError(f"{path} is {_what(path)}; a profiler report is a file")
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        self._bytes: Any = self._file
        self._damage: Any = (OSError,)
        if self._file.read(2) == b"\x1f\x8b":
            from isal import igzip, igzip_lib

            self.zipped = True
            self._damage = (OSError, igzip_lib.IsalError)
            self._file.seek(0)
            self._bytes = igzip.GzipFile(fileobj=self._file, mode="rb")
        else:
            self._file.seek(0)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bytes is not self._file:
            self._bytes.close()
        self._file.close()

    def read(self, size: int = PIECE) -> bytes:
        """The next bytes, at most ``size``; empty at the end. ValueError where they cannot be unzipped."""
        try:
            piece = self._bytes.read(size)
        except EOFError:
            cut = self.broken("the gzip stream ends before its end mark: the file is truncated")
            raise DamagedArchive(str(cut)) from None
        except self._damage as error:
            if self.zipped:
                raise DamagedArchive(str(self.broken(f"the gzip stream is damaged ({error})"))) from None
            raise self.broken(f"cannot be read ({error})") from None
        self.offset += len(piece)
        if self.zipped and self.offset > UNSUSPECTED and self.offset > LARGEST_RATIO * self._file.tell():
            raise ValueError(
                f"{self.path} expands to more than {LARGEST_RATIO} times its size ({self.offset >> 20} MiB "
                f"from {self._file.tell() >> 10} KiB): no report does that"
            )
        return piece

    def rest(self, limit: int) -> bytes:
        """All that is left, for a report that can only be decoded whole."""
        pieces = []
        begun = self.offset
        while piece := self.read():
            pieces.append(piece)
            if self.offset - begun > limit:
                raise ValueError(
                    f"{self.path} is too large for this machine: reports of its kind are decoded whole, and "
                    f"more than {limit >> 20} MiB do not fit into the memory that is free"
                )
        return b"".join(pieces)

    def broken(self, what: str, offset: int | None = None) -> ValueError:
        """An error that says in which file and where."""
        unit = "unzipped byte" if self.zipped else "byte"
        return ValueError(f"{self.path}: {what}, at {unit} {self.offset if offset is None else offset}")


def _what(path: str | Path) -> str:
    if os.path.isdir(path):
        return "a folder"
    if os.path.islink(path):
        return "a link that leads nowhere" if not os.path.exists(path) else "a link to something else"
    return "no ordinary file" if os.path.exists(path) else "not there"


def memory_budget() -> int:
    """Bytes that the tables of one report may take."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        free = 4 << 30
    return int(free * SHARE_OF_MEMORY)
