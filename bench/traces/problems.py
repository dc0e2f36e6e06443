"""What went wrong although a command went on: a line each on stderr, and exit status 1."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from bench.report.units import text_of
from bench.traces.events import Job


def unreadable(*jobs: Job) -> list[str]:
    """A line for each file of these jobs that could not be read."""
    return [text for job in jobs for _, text in job.failures]


def tell(problems: Iterable[str]) -> int:
    """Prints them; returns the exit status."""
    status = 0
    for line in problems:
        print(f"perflab: {text_of(line)}", file=sys.stderr)
        status = 1
    return status
