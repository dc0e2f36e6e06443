"""What a run shows while it works: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from labs.calibration_anchors import said


class Progress:
    def __init__(self, show: bool = True) -> None:
        self._show = show
        self._bar: Any = None
        self._task: Any = None
        self._terminal = show and sys.stderr.isatty()
        self._total = self._count = 0
        self._said = 0.0
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)

    def say(self, text: str) -> None:
        if not self._show or not text:
            return
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, total: int) -> None:
        self._total = total

    def done(self, count: int) -> None:
        self._count = count
        if self._bar is not None:
            self._bar.update(self._task, completed=count, total=self._total)

    def phase(self, subject: str, phase: str) -> None:
        text = f"{subject}: {phase}"
        if self._bar is not None:
            self._bar.update(self._task, description=text[:60])
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.say(text)

    def event(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        where = f"{event.get('lab')}/{event.get('group')} ({event.get('column')} allocator)"
        if kind == "phase":
            self.phase(where, event["phase"])
        elif kind == "group":
            self.done(self._count + 1)
            self.say(f"[{self._count}/{self._total}] {where}" + ("" if event["complete"] else ": incomplete"))
        elif kind == "speed":
            found = event.get("error", "") and f"its speed could not be checked: {event['error']}"
            found = found or said([event["speeds"]])
            self.say(f"{event['lab']} ({event['column']} allocator): {found}" if found else "")
        elif kind == "error":
            self.say(f"{where} {event['variant']}: {event['error']}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
