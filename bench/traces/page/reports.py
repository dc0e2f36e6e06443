"""What reports say of themselves: facts, what was left out of them, their clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.report.units import text_of
from bench.traces.events import Job, Trace
from bench.traces.page.timeline import Clock

_LINES = 8  # of a list; more are counted


def name_of(job: Job) -> str:
    """The last part of the path."""
    return text_of((Path(job.source).name or job.source)[:200], 80)


def titles(traces: Sequence[Trace], side: str = "") -> list[str]:
    """What to call each trace: "rank 3", its file where it has no rank, nothing where it is the only one."""
    if len(traces) == 1:
        return [side]
    names = [f"rank {trace.rank}" if trace.rank >= 0 else Path(trace.source).name for trace in traces]
    return [f"{side}, {name}" if side else name for name in names]


def shifted(nanoseconds: int) -> Clock:
    """A clock that is off by a constant."""
    return lambda time: time + nanoseconds


def own_clocks(traces: Sequence[Trace]) -> list[Clock]:
    """Every trace begins at 0."""
    return [shifted(-int(np.min(trace.events.start, initial=0))) for trace in traces]


def facts(job: Job) -> list[tuple[str, str]]:
    """What the reports say of themselves, once where all ranks say the same."""
    found: dict[str, list[str]] = {}
    for trace in job.traces:
        said = {"format": trace.format, **trace.facts}
        if trace.backend:
            said["backend"] = trace.backend
        if trace.world_size > 1:
            said["ranks"] = f"{len(job.traces)} of {trace.world_size}"
        for name, value in said.items():
            values = found.setdefault(text_of(name[:40], 40), [])
            if (shown := text_of(value[:120], 80)) not in values:
                values.append(shown)
    named = [
        (name, ", ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else ""))
        for name, values in found.items()
    ]
    return [*named, ("slices", f"{sum(len(trace.events) for trace in job.traces):,}")]


def left_out(job: Job) -> str:
    """One line of what the readers dropped, counted; "" when it was nothing."""
    dropped: Counter[str] = Counter()
    for trace in job.traces:
        dropped.update(trace.dropped)
    lines = [f"{count:,} {text_of(why[:200], 160)}" for why, count in dropped.most_common()]
    return f"Not read: {'; '.join(_first(lines))}." if lines else ""


def boxes(job: Job, side: str = "") -> list[tuple[str, bool, list[str]]]:
    """(title, alarm, lines): what could not be read or classified, and notes. side: "base", "new" or ""."""
    of = f" ({side})" if side else ""
    made = []
    if job.failures:
        lines = [f"{text_of(path[:200], 200)}: {text_of(why[:400], 400)}" for path, why in job.failures]
        made.append((f"Files that could not be read{of}", True, _first(lines)))
    unknown: Counter[str] = Counter()
    for trace in job.traces:
        unknown.update(trace.unclassified)
    if unknown:
        kinds = [
            f"{text_of(name[:80], 60) or 'without a category'} ({count:,})"
            for name, count in unknown.most_common()
        ]
        text = f"{sum(unknown.values()):,} slices are in no sum: {', '.join(_first(kinds))}."
        made.append((f"Not classified{of}", False, [text]))
    said = [*job.notes, *(note for trace in job.traces for note in trace.notes)]
    notes = list(dict.fromkeys(text_of(note[:500], 400) for note in said))
    if notes:
        made.append((f"Notes{of}", False, _first(notes)))
    return made


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _LINES else [*lines[:_LINES], f"and {len(lines) - _LINES:,} more"]
