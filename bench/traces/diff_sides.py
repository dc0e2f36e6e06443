"""One side of a comparison: all ranks and recordings of a job as one table of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import numpy as np
from msgspec.structs import replace

from bench.report.units import text_of
from bench.traces.analysis_text import left_out
from bench.traces.diff_steps import StepTable, step_table
from bench.traces.events import Job, Trace
from bench.traces.matching import Frame, Key
from bench.traces.steps import span


@dataclass
class Side:
    """keys: what takes time. nanoseconds, calls: (steps, keys), the mean over ranks. start: int64 (steps,).
    ranks: their numbers (-1: unknown). step_seconds: the median step of each. device: as the file names it.
    """

    source: str
    formats: str
    tables: dict[int, StepTable]
    device: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tables = list(self.tables.values())
        first = tables[0]
        self.ranks = list(self.tables)
        self.given = all(table.given for table in tables)
        self.on_device = any(table.on_device for table in tables)
        self.absolute = all(table.absolute for table in tables)
        self.keys: list[Key] = list(dict.fromkeys(key for table in tables for key in table.keys))
        count = min(len(table) for table in tables)
        self.nanoseconds = np.zeros((count, len(self.keys)))
        self.calls = np.zeros((count, len(self.keys)))
        where = {key: index for index, key in enumerate(self.keys)}
        for table in tables:
            columns = [where[key] for key in table.keys]
            self.nanoseconds[:, columns] += table.nanoseconds[:count] / len(tables)
            self.calls[:, columns] += table.calls[:count] / len(tables)
        self.start = first.start[:count]
        self.step_seconds = {
            rank: float(np.median(table.nanoseconds.sum(axis=1))) / 1e9 for rank, table in self.tables.items()
        }

    def of_ranks(self, ranks: Sequence[int]) -> Side:
        """This side with some of its ranks."""
        return Side(
            self.source, self.formats, {rank: self.tables[rank] for rank in ranks}, self.device, self.notes
        )

    def hosted(self) -> dict[tuple[str, ...], float]:
        """Calls a step of the operators of the host, by their names from the outermost in."""
        found: dict[tuple[str, ...], float] = {}
        for table in self.tables.values():
            for path, calls in table.hosted.items():
                names = tuple(frame.name for frame in path)
                found[names] = found.get(names, 0.0) + calls / len(self.tables)
        return found

    def kernels_of(self, keys: Sequence[Key]) -> dict[str, float]:
        """Nanoseconds a step of each kernel that runs for these keys."""
        found: dict[str, float] = {}
        for table in self.tables.values():
            for key in keys:
                for name, nanoseconds in table.kernels.get(key, {}).items():
                    found[name] = found.get(name, 0.0) + nanoseconds / len(table) / len(self.tables)
        return found


def side(job: Job) -> Side:
    """ValueError where there is nothing to compare."""
    traces = [trace for trace in job.traces if len(trace.events)]
    if not traces:
        raise ValueError(f"{job.source} holds no events: nothing to compare")
    notes = [f"{path} could not be read: {why}" for path, why in job.failures] + job.notes
    if len(job.traces) > len(traces):
        notes.append(f"{len(job.traces) - len(traces)} reports without events left out")
    if strange := sorted({trace.unit for trace in traces} - {""}):
        raise ValueError(f"{job.source} counts in {text_of(strange[0], 40)}, which is no time to compare")
    tables: dict[int, StepTable] = {}
    for rank, own in _by_rank(traces).items():
        recordings = _without_overlaps(own)
        tables[rank] = _joined([step_table(trace) for trace in recordings])
        whose = f"rank {rank}: " if len(own) < len(traces) else ""
        if len(recordings) > 1:
            notes.append(f"{whose}{len(recordings)} recordings, made one after another, count as one")
        if len(recordings) < len(own):
            notes.append(
                f"{whose}{len(own) - len(recordings)} recordings left out that were made at the same time as "
                "another of this rank"
            )
    notes += _about_steps(tables) + _about_reading(traces)
    devices = sorted({trace.facts.get("device", "") for trace in traces} - {""})
    formats = ", ".join(sorted({trace.format for trace in traces}))
    return Side(job.source, formats, tables, ", ".join(devices), notes)


def _about_reading(traces: Sequence[Trace]) -> list[str]:
    """What readers left out or could not classify, summed over the reports, and what else they say."""
    dropped: Counter[str] = Counter()
    unclassified: Counter[str] = Counter()
    for trace in traces:
        dropped.update(trace.dropped)
        unclassified.update(trace.unclassified)
    summed = replace(traces[0], dropped=dropped, unclassified=unclassified)
    return left_out(summed) + list(dict.fromkeys(note for trace in traces for note in trace.notes))


def _by_rank(traces: Sequence[Trace]) -> dict[int, list[Trace]]:
    """The recordings of each rank. A trace without a rank is one of its own, but for recordings of one
    process made one after another; the only trace keeps its rank, also where that is unknown (-1)."""
    if len(traces) == 1 or _of_one_process(traces):
        return {traces[0].rank: list(traces)}
    found: dict[int, list[Trace]] = {}
    for trace in traces:
        if trace.rank >= 0:
            found.setdefault(trace.rank, []).append(trace)
    free = (number for number in count() if number not in found)
    for trace in traces:
        if trace.rank < 0:
            found[next(free)] = [trace]
    return found


def _of_one_process(traces: Sequence[Trace]) -> bool:
    """Ranks of one job run at the same time; recordings that do not overlap are of one process, unless their
    files, or these files' names, say that they are of different ranks."""
    if len({trace.rank for trace in traces if trace.rank >= 0 and not trace.rank_made_up}) > 1:
        return False
    if any(trace.origin_ns <= 0 for trace in traces):
        return False
    spans = sorted(_window(trace) for trace in traces)
    return all(end <= start for (_, end), (start, _) in pairwise(spans))


def _window(trace: Trace) -> tuple[int, int]:
    """Nanoseconds since 1970 of what was recorded; of a trace that does not say, from its own beginning."""
    first, last = span(trace)
    return trace.origin_ns + first, trace.origin_ns + last


def _without_overlaps(traces: Sequence[Trace]) -> list[Trace]:
    """Recordings of one rank in order of time. One process makes one at a time: of two that are known to
    overlap (a file and its copy) the first counts."""
    kept: list[Trace] = []
    for trace in sorted(traces, key=_window):
        known = trace.origin_ns > 0 and bool(kept) and kept[-1].origin_ns > 0
        if not known or _window(trace)[0] >= _window(kept[-1])[1]:
            kept.append(trace)
    return kept


def _joined(tables: Sequence[StepTable]) -> StepTable:
    """The steps of several recordings in one table."""
    if len(tables) == 1:
        return tables[0]
    keys = list(dict.fromkeys(key for table in tables for key in table.keys))
    where = {key: index for index, key in enumerate(keys)}
    count = sum(len(table) for table in tables)
    nanoseconds, calls = np.zeros((count, len(keys))), np.zeros((count, len(keys)))
    kernels: dict[Key, Counter[str]] = {}
    hosted: Counter[tuple[Frame, ...]] = Counter()
    trimmed: Counter[str] = Counter()
    row = 0
    for table in tables:
        columns = [where[key] for key in table.keys]
        nanoseconds[row : row + len(table), columns] = table.nanoseconds
        calls[row : row + len(table), columns] = table.calls
        row += len(table)
        trimmed.update(table.trimmed)
        hosted.update({path: calls * len(table) / count for path, calls in table.hosted.items()})
        for key, names in table.kernels.items():
            kernels.setdefault(key, Counter()).update(names)
    return StepTable(
        keys,
        nanoseconds,
        calls,
        np.concatenate([table.start for table in tables]),
        all(table.absolute for table in tables),
        any(table.on_device for table in tables),
        all(table.given for table in tables),
        kernels,
        trimmed,
        dict(hosted),
    )


def _about_steps(tables: dict[int, StepTable]) -> list[str]:
    notes = []
    trimmed: Counter[str] = Counter()
    for table in tables.values():
        trimmed.update(table.trimmed)
    notes += [f"{count} steps left out: {reason}" for reason, count in trimmed.items()]
    lengths = sorted({len(table) for table in tables.values()})
    if len(lengths) > 1:
        notes.append(
            f"ranks recorded {lengths[0]} to {lengths[-1]} steps: the first {lengths[0]} are compared"
        )
    if not all(table.given for table in tables.values()):
        notes.append("no steps are marked: the whole recording counts as one")
    return notes
