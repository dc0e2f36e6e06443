"""Profiles of a group's steps after its timed rounds, and what is said of them: diagnosis and difference."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.profile.steps import record
from bench.rounds import Timed
from bench.traces.events import Job
from bench.world.steps import WorldStep


def profiles(
    steps: Mapping[str, Timed], wanted: Mapping[str, int]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By variant ``{"diagnosis": ..., "difference": ...}``: what the program says of each one's report, and
    how that differs from the first one's; and by variant what went wrong. wanted: how many steps of it."""
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    first: Job | None = None
    for address, count in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                job = _profile(steps[address], count, Path(folder))
                found[address] = _said(job, first)
                first = first or job
            except Exception as error:
                problems[address] = f"profile: {type(error).__name__}: {' '.join(str(error).split())}"
    return found, problems


def _profile(timed: Timed, count: int, folder: Path) -> Job:
    from bench.traces.load import load

    if isinstance(timed.step, WorldStep):
        timed.step.profile(count, str(folder))
    else:
        record(timed.step, count, folder / "profile.json.gz", wait=timed.clock.wait)
    return load(folder)


def _said(job: Job, first: Job | None) -> dict[str, Any]:
    from bench.diagnosis.verdict import diagnose
    from bench.traces.diff import difference

    sentence = ""
    if first is not None:
        with contextlib.suppress(ValueError):  # nothing in common
            sentence = difference(first, job).sentence
    return {"diagnosis": diagnose(job).to_json(), "difference": sentence}
