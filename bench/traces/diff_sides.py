"""One side of a comparison: all ranks and recordings of a job as one table of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from msgspec.structs import replace

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
    if _one_after_another(traces):
        ordered = sorted(traces, key=lambda trace: trace.origin_ns)
        tables = {traces[0].rank: _joined([step_table(trace) for trace in ordered])}
        notes.append(f"{len(traces)} recordings, made one after another, count as one")
    else:
        tables = {}
        for place, trace in enumerate(traces):
            number = trace.rank if trace.rank >= 0 and trace.rank not in tables else place
            while number in tables:
                number += 1
            tables[number if len(traces) > 1 else trace.rank] = step_table(trace)
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


def _one_after_another(traces: Sequence[Trace]) -> bool:
    """Ranks of one job run at the same time; recordings that do not overlap are of one process."""
    if len(traces) < 2 or any(trace.origin_ns <= 0 for trace in traces):
        return False
    spans = sorted((trace.origin_ns + span(trace)[0], trace.origin_ns + span(trace)[1]) for trace in traces)
    return all(end <= start for (_, end), (start, _) in pairwise(spans))


def _joined(tables: Sequence[StepTable]) -> StepTable:
    """The steps of several recordings in one table."""
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
