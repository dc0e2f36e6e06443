"""The run's journal: one JSON line an event, on disk before the next measurement starts.

Whatever stops a run (Ctrl-C, ``kill -9``, a full disk, a lab that raises), every line written before is
safe, and ``perflab run --resume`` goes on from there. A last line that was cut short is ignored.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Appends events to a file; several processes may append in turn."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: str, **content: Any) -> None:
        line = json.dumps({"event": event, "at": round(time.time(), 3), **content}, default=_plain) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            data = line.encode()
            if _ends_mid_line(self.path):
                data = b"\n" + data
            while data:  # a full disk or a signal may cut a write short
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> Iterator[dict[str, Any]]:
        yield from self.events_from(0)[1]

    def events_from(self, offset: int) -> tuple[int, list[dict[str, Any]]]:
        """(new offset, complete events behind ``offset`` bytes): how a reader follows a running journal."""
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return offset, []
        end = data.rfind(b"\n") + 1
        events = []
        for line in data[:end].splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the line a killed process left half written
        return offset + end, [event for event in events if isinstance(event, dict) and "event" in event]


def _ends_mid_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, and paths, as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} to the journal")
