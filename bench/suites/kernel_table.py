"""The table of speeds that ``test_kernels.py`` prints: a row for each line and allocator."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.suites.lines import verdict

if TYPE_CHECKING:
    from bench.stats import Comparison
    from kernels.spec import Benchmark


@dataclass(frozen=True)
class Row:
    """Ours beside the fastest peer; low and high bound the speed-up; fraction is limit / ours.

    limit: what the fraction is of. left_out: peers that were not timed in rounds: how many times slower than
    the fastest they are in a call. peak_fraction: share of the FLOP/s that the cores reached in the same run.
    held_bytes, peer_held_bytes: by how much a call grows memory, where that is what the operation is for.
    """

    name: str
    allocator: str
    seconds: float
    peer: str
    peer_seconds: float
    low: float
    speedup: float
    high: float
    fraction: float | None
    flops: float
    target: float | None
    left_out: Mapping[str, float] = field(default_factory=dict)
    limit: str = "a copy"
    peak_fraction: float | None = None
    held_bytes: int | None = None
    peer_held_bytes: int | None = None

    @classmethod
    def of(
        cls,
        line: Benchmark,
        allocator: str,
        medians: Mapping[str, float],
        against: Mapping[str, Comparison],
        left_out: Mapping[str, float],
        peak: float | None = None,
        held: Mapping[str, int | None] | None = None,
    ) -> Row:
        """against: each peer compared with ours, so that its ratio is our speed-up over it. peak: FLOP/s of
        all cores for the line's dtype. held: bytes that a call of ours ("kernels") and of each peer holds.
        """
        peer = min(against, key=lambda name: against[name].ratio)
        limit = medians["limit"] / medians["kernels"] if "limit" in medians else None
        return cls(
            line.name,
            allocator,
            medians["kernels"],
            peer,
            medians[peer],
            against[peer].low,
            against[peer].ratio,
            against[peer].high,
            limit,
            line.flops / medians["kernels"],
            line.target if allocator == "tuned" else None,  # targets are about kernels, not page faults
            left_out,
            "a pass in place" if line.rewritten else "a copy",
            line.flops / medians["kernels"] / peak if line.flops and peak else None,
            held["kernels"] if held else None,
            held[peer] if held else None,
        )

    @property
    def verdict(self) -> str:
        """Against the target; without one, against the peer."""
        return verdict(self.low, self.high, self.target)

    @property
    def of_limit(self) -> str:
        """How near it comes to the limit that it is nearest to; nothing where one of them is not known."""
        if self.flops and self.peak_fraction is None:
            return ""
        limits = [(self.fraction or 0.0, self.limit), (self.peak_fraction or 0.0, "the FLOP/s")]
        share, limit = max(limits)
        return f"{share:.0%} of {limit}" if share else ""

    @property
    def memory(self) -> str:
        """What a call holds of ours and of the peer; empty where that is not what the operation is for."""
        from bench.report.units import format_quantity

        if self.held_bytes is None or self.peer_held_bytes is None:
            return ""
        held = (self.held_bytes, self.peer_held_bytes)
        return " against ".join(format_quantity(one, "B", digits=2) for one in held)


HEADINGS = (
    "operation",
    "malloc",
    "kernels",
    "best peer",
    "",
    "speed-up",
    "95 % interval",
    "of limit",
    "memory",
    "target",
)
LEFT = ("operation", "malloc", "best peer", "target")


def render(rows: list[Row], width: int) -> str:
    """The table as text, every line, won or lost; lines of the same benchmark stand together."""
    order = list(dict.fromkeys(row.name for row in rows))
    cells = [_cells(row) for row in sorted(rows, key=lambda row: (order.index(row.name), row.allocator))]
    title = "kernels beside the best peer (speed-up = peer / kernels)"
    try:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:  # a GPU machine may lack it
        return _plain(title, cells) + _left_out(rows)
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    for row in cells:
        table.add_row(*map(escape, row))
    text = io.StringIO()
    Console(file=text, width=max(width, 130)).print(table)
    return text.getvalue() + _left_out(rows)


def _left_out(rows: list[Row]) -> str:
    """A line for each row whose slow peers were not timed."""
    lines = [
        f"not timed for {row.name} ({row.allocator}), a call of the fastest peer being "
        + ", ".join(f"{factor:.0f}x faster than {peer}" for peer, factor in sorted(row.left_out.items()))
        for row in rows
        if row.left_out
    ]
    return "\n".join([*lines, ""]) if lines else ""


def _cells(row: Row) -> tuple[str, ...]:
    from bench.report.units import format_seconds

    limit = ", ".join(filter(None, [row.of_limit, f"{row.flops / 1e9:.0f} GFLOP/s" if row.flops else ""]))
    return (
        row.name,
        row.allocator,
        format_seconds(row.seconds),
        row.peer,
        format_seconds(row.peer_seconds),
        f"{row.speedup:.2f}",
        f"[{row.low:.2f}, {row.high:.2f}]",
        limit,
        row.memory,
        f"{row.target:.2f} {row.verdict}" if row.target is not None else row.verdict,
    )


def _plain(title: str, cells: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if heading in LEFT else text.rjust(width)
            for text, width, heading in zip(row, widths, HEADINGS, strict=True)
        ).rstrip()
        for row in (HEADINGS, *cells)
    ]
    return "\n".join([title, *lines, ""])
