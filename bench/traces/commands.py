"""``perflab trace``: what a profiler report says, printed, written and held against limits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.report.units import text_of
from bench.traces.analysis import MOST_OPERATIONS
from bench.traces.job_report import JobReport, examine, load_all, to_json
from bench.traces.problems import tell, unreadable
from bench.traces.tables import percent

_PARTS = {"--max-idle": ("idle", "idle"), "--max-exposed": ("exposed communication", "exposed")}


@dataclass(frozen=True)
class Limit:
    """A part of the time that must stay below a share. option: as the user wrote it."""

    option: str
    share: float

    @classmethod
    def of(cls, option: str, text: str) -> Limit:
        """From ``20%`` or ``0.2``; ValueError otherwise."""
        from bench.compare import parse_share

        share = parse_share(text, option)
        if share > 1:
            raise ValueError(f"{option} takes a share up to 100%, not {text!r}")
        return cls(option, share)

    def broken(self, report: JobReport) -> list[str]:
        """A line for each trace in which the part is larger. ValueError: a trace does not tell."""
        name, part = _PARTS[self.option]
        lines = []
        for one in report.analyses:
            if one.whole is None or not one.whole.span:
                raise ValueError(f"{one.trace.source} has no times that {self.option} could hold")
            if one.whole.share(part) > self.share:
                who = f"rank {one.trace.rank}: " if report.ranks is not None else ""
                share = percent(getattr(one.whole, part), one.whole.span)
                lines.append(f"{who}{name} {share}, more than {self.share * 100:g} %")
        return lines


def trace(
    paths: list[Path],
    *,
    step: str = "",
    top: int,
    as_json: bool = False,
    markdown: bool = False,
    page: Path | None = None,
    merged: Path | None = None,
    limits: list[Limit],
) -> int:
    """Prints what the reports say; returns the exit status: 1 when a limit is broken or a file unreadable.

    page, merged: also write the HTML page, the Chrome trace of all ranks. ValueError: nothing can be read,
    there is no such step, or a file cannot be written.
    """
    job = load_all(paths)
    report = examine(job, step, max(top, MOST_OPERATIONS))
    written = []
    if merged is not None:
        written += _merge(report, merged)
    if page is not None:
        from bench.traces.page import write_trace_page

        written.append(f"page: {write_trace_page(job, page, report)}")
    if as_json:
        print(json.dumps(to_json(report), indent=1, allow_nan=False))
    elif markdown:
        from bench.traces.markdown import to_markdown

        print(to_markdown(report, top), end="")
    else:
        from rich.console import Console

        from bench.traces.terminal import print_report

        print_report(report, Console(), top)
    for line in written:
        print(line, file=sys.stderr if as_json or markdown else sys.stdout)
    return tell([*unreadable(job), *(line for limit in limits for line in limit.broken(report))])


def _merge(report: JobReport, path: Path) -> list[str]:
    """Writes all ranks into one Chrome trace; what to say of it."""
    from bench.traces.merge import merge
    from bench.traces.ranks import compare_ranks

    done = merge(report.job, report.ranks or compare_ranks(report.job), path)
    lines = [f"merged trace: {done.path} ({done.events} events)"]
    lines += [f"left out of it: {count} {text_of(what)}" for what, count in done.left_out.items()]
    return lines + [text_of(note) for note in done.notes]
