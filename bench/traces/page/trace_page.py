"""The page of one trace, or of all ranks of a job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.report.page import write_text
from bench.report.units import format_seconds
from bench.traces.clocks import RankClock
from bench.traces.collectives import Matched
from bench.traces.events import Job, Trace
from bench.traces.job_report import JobReport, examine, sentence
from bench.traces.page import reports, trace_sections, views
from bench.traces.page.document import render
from bench.traces.page.flame import call_tree, flame
from bench.traces.page.packing import Words
from bench.traces.page.sections import Section, as_sentence
from bench.traces.page.timeline import Clock, timeline
from bench.traces.ranks import Ranks
from bench.traces.ranks_rounds import bases


def write_trace_page(job: Job, path: str | os.PathLike[str], report: JobReport | None = None) -> Path:
    """Writes the page of a job in one step and returns where; ValueError when it cannot be written.

    report: ``examine(job)``; made here where it is not given.
    """
    return write_text(render_trace_page(job, report), path)


def render_trace_page(job: Job, report: JobReport | None = None) -> str:
    """The page of a job: one trace, or several ranks on a common clock."""
    report = examine(job) if report is None else report
    words = Words()
    timed = [trace for trace in job.traces if trace.timed and len(trace.events)]
    clocks, lines = _clocks(timed, report.ranks)
    drawn = timeline(timed, clocks, reports.titles(timed), words) if timed else None
    unit = job.traces[0].unit if job.traces else ""
    alike = [trace for trace in job.traces if trace.unit == unit]
    tree = call_tree(alike)
    frames = flame(tree, words, unit=unit) if len(tree) else None
    other = len(job.traces) - len(alike)
    left_out = [f"{other} reports count in another unit and are not in the call tree."] if other else []
    before, after = _sections(report)
    return render(
        "trace.html.j2",
        {
            "timeline": drawn.data if drawn else None,
            "flame": frames.data if frames else None,
            "names": words.texts,
        },
        title=reports.name_of(job),
        sentence=as_sentence(sentence(report)) if report.analyses else "",
        facts=reports.facts(job),
        left_out=[line for line in [reports.left_out(job), *left_out] if line],
        boxes=reports.boxes(job),
        before=before,
        after=after,
        timeline_view=views.timeline_view(timed, drawn, words, lines) if drawn else None,
        flame_view=views.flame_view(tree, frames, unit) if frames else None,
        made_by="perflab trace",
    )


def _sections(report: JobReport) -> tuple[list[Section], list[Section]]:
    """Cards above the drawings, and below."""
    if not report.analyses:
        return [], []
    before = [trace_sections.time_section(report)]
    if report.ranks is not None:
        before.append(trace_sections.ranks_section(report.ranks))
    after = [trace_sections.detail_section(report)]
    return [section for section in before if section], [section for section in after if section]


def _clocks(traces: Sequence[Trace], ranks: Ranks | None) -> tuple[list[Clock], list[str]]:
    """A clock for each trace, and how they stand to each other, as sentences."""
    if len(traces) < 2:
        return reports.own_clocks(traces), []
    matched = ranks.matched if ranks is not None else None
    if ranks is not None and matched is not None and len(ranks.clocks) == len(traces):
        return _aligned(traces, ranks, matched), _alignment(ranks)
    if all(trace.origin_ns for trace in traces):
        first = min(trace.origin_ns for trace in traces)
        clocks = [reports.shifted(trace.origin_ns - first) for trace in traces]
        return clocks, ["Ranks stand by the clocks of their machines."]
    return reports.own_clocks(traces), [
        "The files do not say when they began: each rank begins at 0, "
        "and what stands below one another need not have happened together."
    ]


def _aligned(traces: Sequence[Trace], ranks: Ranks, matched: Matched) -> list[Clock]:
    def corrected(clock: RankClock, base: int) -> Clock:
        return lambda times: clock.correct(times + base)

    return [corrected(*pair) for pair in zip(ranks.clocks, bases(matched, traces), strict=True)]


def _alignment(ranks: Ranks) -> list[str]:
    unknown = [
        str(rank) for rank, clock in zip(ranks.ranks, ranks.clocks, strict=True) if clock.how == "unknown"
    ]
    exact = max(clock.exact for clock in ranks.clocks)
    lines = [f"All ranks stand on one clock, exact to {format_seconds(exact / 1e9)}."] if exact else []
    if unknown:
        lines.append(f"Nothing relates the clock of rank {', '.join(unknown)} to the others'.")
    return lines
