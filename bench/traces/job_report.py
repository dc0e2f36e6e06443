"""What ``perflab trace`` reports of a job: every rank beside the others, and one of them in detail."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.traces import analysis_tables, analysis_text
from bench.traces.analysis import MOST_OPERATIONS, Analysis, analyse
from bench.traces.events import Job
from bench.traces.load import load
from bench.traces.tables import Columns

if TYPE_CHECKING:
    from bench.traces.ranks import Ranks


@dataclass(frozen=True)
class JobReport:
    """analyses: one for each trace of the job. ranks: what they say together; None of a single trace."""

    job: Job
    analyses: list[Analysis]
    ranks: Ranks | None

    @property
    def detailed(self) -> Analysis:
        """The rank that is late for certain, else the first."""
        late = {one.rank for one in self.ranks.late} if self.ranks else set()
        return next((one for one in self.analyses if one.trace.rank in late), self.analyses[0])


@dataclass(frozen=True)
class Part:
    """A heading ("" without), lines and tables; all in plain text, with names as in the file."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Columns] = field(default_factory=list)


def load_all(paths: list[Path]) -> Job:
    """Files and folders as one job. What cannot be read is in its failures; ValueError when nothing can."""
    if len(paths) == 1:
        return load(paths[0])
    from bench.traces.folders import number_ranks

    job = Job(", ".join(map(str, paths)), [])
    for path in paths:
        try:
            part = load(path)
        except ValueError as error:
            job.failures.append((str(path), str(error)))
            continue
        job.traces += part.traces
        job.failures += part.failures
        job.notes += [note for note in part.notes if note not in job.notes]
    if not job.traces:
        raise ValueError(job.failures[0][1])
    number_ranks(job)
    return job


def examine(job: Job, step: str = "", most: int = MOST_OPERATIONS) -> JobReport:
    """Analyses each trace, and the ranks together where there are several.

    step, most: as of ``analyse``. ValueError: a trace has no such step.
    """
    analyses = [analyse(trace, step, most) for trace in job.traces]
    if len(analyses) < 2:
        return JobReport(job, analyses, None)
    from bench.traces.ranks import compare_ranks

    return JobReport(job, analyses, compare_ranks(job))


def sentence(report: JobReport) -> str:
    """What matters most: of a job who is late, of one trace what dominates."""
    if report.ranks is None:
        return analysis_text.sentence(report.analyses[0])
    from bench.traces import ranks_text

    # One step is no sample of how ranks wait for one another: that is always of all of them.
    scope = ", over all steps" if report.analyses[0].step else ""
    return f"{len(report.analyses)} ranks{scope}: {ranks_text.sentence(report.ranks)}"


def parts(report: JobReport, top: int, longest: int) -> list[Part]:
    """All that stands below the sentence. top: rows of a table. longest: letters of a name."""
    failures = [f"cannot be read: {text}" for _, text in report.job.failures]
    found = [Part("", failures + report.job.notes)]
    if report.ranks is not None:
        from bench.traces import ranks_text

        times = analysis_tables.time_table(report.analyses)
        tables = [times, *ranks_text.tables(report.ranks)]
        found.append(Part("", ranks_text.notes(report.ranks), [table for table in tables if table.rows]))
    one = report.detailed
    title = f"Rank {one.trace.rank} in detail" if report.ranks is not None else ""
    lines = [analysis_text.sentence(one)] if report.ranks is not None else []
    lines += [f"{name}: {value}" for name, value in one.trace.facts.items()] + analysis_text.notes(one)
    tables = analysis_tables.tables(one, top, longest)
    if report.ranks is None:
        tables = [analysis_tables.time_table([one]), *tables]
    found.append(Part(title, lines, [table for table in tables if table.rows]))
    return found


def to_json(report: JobReport) -> dict[str, Any]:
    """All of it as plain data; see the ``to_json`` of analysis and ranks for the units."""
    ranks = None
    if report.ranks is not None:
        from bench.traces import ranks_text

        ranks = ranks_text.to_json(report.ranks)
    return {
        "sentence": sentence(report),
        "source": report.job.source,
        "time_unit": "ns",
        "traces": [analysis_text.to_json(one) for one in report.analyses],
        "ranks": ranks,
        "failures": [{"source": source, "error": error} for source, error in report.job.failures],
        "notes": report.job.notes,
    }
