"""``perflab diagnose``: the bottleneck of a job from its profile, by name, with evidence and what to try.

Imports no torch: a report is read in a moment.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.diagnosis.causes import LEAST, Evidence, percent
from bench.diagnosis.facts import Facts
from bench.diagnosis.verdict import Diagnosis, decide, diagnose, weight
from bench.report.units import text_of
from bench.traces.events import Job
from bench.traces.problems import tell, unreadable


def diagnose_path(path: Path, as_json: bool) -> int:
    """A report, a folder of them, or a results file with diagnoses in it; the exit status, 1 when a file of
    the folder could not be read. ValueError: it is none of these."""
    from bench.traces.load import is_trace, load

    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    if is_trace(path):
        return _show_job(str(path), load(path), as_json)
    return _from_results(path, as_json)


def diagnose_program(words: Sequence[str], as_json: bool) -> int:
    """Run a Python program under torch.profiler, then say what held it up; the program's status when it
    failed.

    The program's own output stays where it is, and the diagnosis follows it; with ``as_json`` it goes to
    stderr, so that stdout is JSON and nothing else.
    """
    from bench.profile.command import profile_program
    from bench.traces.load import load

    with tempfile.TemporaryDirectory(prefix="perflab-diagnose-") as folder:
        place = Path(folder) / "profile"
        status = profile_program(words, "torch", place, memory=False, quiet=as_json)
        if status:
            return status
        if not place.is_dir() or not any(place.iterdir()):
            raise ValueError(
                f"{shlex.join(words)} left no profile: it has to use torch; perflab profile -- "
                f"{shlex.join(words)} "
                "records other programs"
            )
        return _show_job(shlex.join(words), load(place), as_json)


def _from_results(path: Path, as_json: bool) -> int:
    from bench.results import load

    found: dict[str, Mapping[str, Any]] = {}
    for entry in load(path)["benchmarks"]:
        extra = entry.get("extra_info")
        said = extra.get("diagnosis") if isinstance(extra, dict) else None
        facts = said.get("facts") if isinstance(said, dict) else None
        if isinstance(facts, dict) and isinstance(extra, dict):
            found[f"{extra.get('lab', '')}:{extra.get('variant', entry['fullname'])}"] = facts
    if not found:
        raise ValueError(
            f"{path} holds no diagnosis: none of its variants was profiled; perflab profile "
            f"LAB:VARIANT records "
            "one, and perflab diagnose reads the report"
        )
    try:
        diagnoses = {name: decide(Facts.from_json(facts)) for name, facts in found.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: a diagnosis in it is damaged: {error}") from None
    if as_json:
        print(json.dumps({name: one.to_json() for name, one in diagnoses.items()}, indent=1))
        return 0
    for name, one in diagnoses.items():
        for line in lines(name, one):
            print(text_of(line))
    return 0


def headline(diagnosis: Diagnosis) -> str:
    """The verdict in a sentence."""
    evidence, second = diagnosis.evidence, diagnosis.second
    next_ = f"; next: {second.cause} ({_part(second)})" if second and weight(second) > 0.02 else ""
    if evidence is None:
        return f"no bottleneck ({diagnosis.sure}): nothing costs {percent(LEAST)} of the time{next_}"
    gain = evidence.gain
    faster = f", about {gain:.2f}x faster without it" if gain is not None else ""
    return f"{evidence.cause} ({diagnosis.sure}): {_part(evidence)}{faster}{next_}"


def _part(evidence: Evidence) -> str:
    """ "70 % of the time", or of the room in memory."""
    return f"{percent(evidence.share)} of the {evidence.of}"


def lines(source: str, diagnosis: Diagnosis) -> list[str]:
    """What the terminal shows."""
    facts = diagnosis.facts
    who = f"{facts.ranks} ranks, " if facts.ranks > 1 else ""
    found = [f"{source}: {who}{facts.steps} steps of {1e3 * facts.step_s:.3g} ms", headline(diagnosis)]
    shown = diagnosis.ranked[0] if diagnosis.ranked else None
    if shown is not None:
        found += [f"  because {text}" for text in shown.because]
        if diagnosis.evidence is not None:
            found += [f"  try     {text}" for text in shown.attempts]
    second = diagnosis.second
    if second is not None and second is not shown and weight(second) >= LEAST / 2:
        found += [f"  also    {second.cause}: {text}" for text in second.because]
    if facts.load is not None and facts.cores and facts.load > 1.5 * facts.cores:
        found.append(
            f"  beware  the load average was {facts.load:.1f} on {facts.cores} cores: other programs "
            f"may be the cause"
        )
    return found + [f"  unseen  {text}" for text in facts.lacks]


def _show_job(source: str, job: Job, as_json: bool) -> int:
    """The exit status: what a rank would have said that could not be read, the diagnosis lacks."""
    diagnosis = diagnose(job)
    if as_json:
        print(json.dumps({"source": source, **diagnosis.to_json()}, indent=1))
    else:
        for line in lines(source, diagnosis):
            print(text_of(line))
    return tell(unreadable(job))
