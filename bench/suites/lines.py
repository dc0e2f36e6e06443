"""What a suite prints at the end of a run: a line for each comparison, won or lost."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from bench.plugin import TABLES

Render = Callable[[list[Any], int], str]
"""(lines, width of the terminal) -> the table as text."""
_LINES = pytest.StashKey[dict[Render, list[Any]]]()


def gathered(config: pytest.Config, render: Render) -> list[Any]:
    """The lines of a suite so far; its first call announces their table."""
    suites = config.stash.setdefault(_LINES, {})
    if render not in suites:
        suites[render] = []
        config.stash.setdefault(TABLES, []).append(lambda width: render(suites[render], width))
    return suites[render]


def verdict(low: float, high: float, aim: float | None) -> str:
    """What the interval of a speed-up says of the aim or, without one, of the peer."""
    better, worse = ("faster", "slower") if aim is None else ("met", "missed")
    wanted = 1.0 if aim is None else aim
    return better if low >= wanted else worse if high < wanted else "undecidable"


@dataclass(frozen=True)
class Line:
    """Ours against a peer: a ratio that is to be at least ``aim`` (None: nothing is promised), with its 95 %
    interval."""

    name: str
    peer: str
    ratio: float
    low: float
    high: float
    aim: float | None

    @property
    def verdict(self) -> str:
        return verdict(self.low, self.high, self.aim)


def table(lines: Sequence[Line], width: int, *, title: str, ratio: str, digits: int, unit: str = "") -> str:
    """All lines as text. ratio: the heading of their ratios, shown with ``digits`` decimals and the unit."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=title)
    for heading in ("ours", "against", ratio, "95 % interval", "aim", ""):
        shown.add_column(heading, justify="left" if heading in ("ours", "against", "") else "right")
    for line in lines:
        interval = f"[{line.low:.{digits}f}, {line.high:.{digits}f}]"
        aim = "" if line.aim is None else f"{line.aim:.2f}{unit}"
        shown.add_row(line.name, line.peer, f"{line.ratio:.{digits}f}{unit}", interval, aim, line.verdict)
    text = io.StringIO()
    Console(file=text, width=max(width, 100)).print(shown)
    return text.getvalue()
