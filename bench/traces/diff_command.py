"""``perflab compare`` for two profiler reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.stats import MIN_SAMPLES_UNPAIRED
from bench.traces.diff import difference
from bench.traces.diff_report import TOP, print_difference, to_json, to_markdown
from bench.traces.load import is_trace, load
from bench.traces.problems import tell, unreadable


def are_traces(base: Path, new: Path) -> bool:
    """Whether both are profiler reports. ValueError where only one is."""
    if not (base.exists() and new.exists()):
        return False  # the reader of results says which one is missing
    kinds = [is_trace(path) for path in (base, new)]
    if kinds[0] != kinds[1]:
        report, other = (base, new) if kinds[0] else (new, base)
        raise ValueError(f"{report} is a profiler report and {other} is none: compare takes two of one kind")
    return kinds[0]


def compare_traces(
    base: Path,
    new: Path,
    *,
    limit: float | None = None,
    as_json: bool = False,
    markdown: bool = False,
    page: Path | None = None,
    top: int = TOP,
) -> int:
    """Prints the comparison (and writes the page); 1 if the step is slower by more than ``limit``, or a file
    of a folder could not be read, else 0.

    ValueError: unreadable, nothing to compare, or too few steps for a limit to hold.
    """
    jobs = load(base), load(new)
    found = difference(*jobs)
    if page is not None:
        from bench.traces.page import write_difference_page

        write_difference_page(*jobs, found, page)
    if as_json:
        print(json.dumps(to_json(found), indent=1, allow_nan=False))
    elif markdown:
        print(to_markdown(found, top), end="")
    else:
        from rich.console import Console

        print_difference(found, Console(), top)
        if page is not None:
            print(f"page: {page}")
    status = tell(unreadable(*jobs))
    if limit is None:
        return status
    if found.step.verdict == "undecidable" and min(found.base_steps, found.new_steps) < MIN_SAMPLES_UNPAIRED:
        raise ValueError(
            f"--fail-above takes {MIN_SAMPLES_UNPAIRED} steps or more of each report, to tell a change from "
            f"chance, not {found.base_steps} and {found.new_steps}"
        )
    if found.step.low > 1 + limit:
        print(f"the step is slower by more than {limit * 100:g} %", file=sys.stderr)
        return 1
    return status
