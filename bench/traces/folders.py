"""A folder of reports as one job: which files belong to it, and which rank each is."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from msgspec import Struct, field

from bench.traces.events import Job
from bench.traces.recognise import KINDS, SomethingElse, recognise

_SUFFIXES = (".json", ".gz", ".pb", ".prof", ".sqlite", ".trace", ".pstat")
"""A file so called that cannot be recognised is a broken report, unless it is whole and of another kind; any
other one is something else."""

_RANK = re.compile(r"(?:rank|worker)[-_. ]?(\d{1,7})(?!\d)", re.IGNORECASE)
_DATED = re.compile(r"\d{4}_\d\d_\d\d_\d\d_\d\d_\d\d")  # plugins/profile/2026_11_26_21_30_05, of TensorBoard
_DEEPEST, _MOST_FILES = 6, 20_000


class Recordings(Struct):
    """files: the reports of one job. failures, notes: as in ``Job``."""

    files: list[Path] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_recordings(folder: Path) -> Recordings:
    """The reports in a folder; those of its subfolders when it has none of its own. Links to folders are not
    followed. ValueError: there are none, or several jobs of which the user has to name one."""
    by_folder: dict[Path, Recordings] = {}
    seen = 0
    for name, subfolders, files in os.walk(folder):
        here = Path(name)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        if len(here.relative_to(folder).parts) >= _DEEPEST:
            subfolders.clear()
        seen += len(files)
        if seen > _MOST_FILES:
            raise ValueError(f"{folder} holds more than {_MOST_FILES} files; name the folder of one job")
        found = _in_folder(here, sorted(f for f in files if not f.startswith(".")))
        if found.files or found.failures:
            by_folder[here] = found
            if here == folder and found.files:  # what lies deeper belongs to something else
                break
    if not any(found.files for found in by_folder.values()):
        broken = [failure for found in by_folder.values() for failure in found.failures]
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise ValueError(f"no report in {folder} can be read{more}: {broken[0][1]}")
        raise ValueError(f"{folder} holds no profiler report; expected {KINDS}")
    return _one_job(folder, by_folder)


def _in_folder(folder: Path, names: list[str]) -> Recordings:
    found = Recordings()
    others: list[str] = []
    for name in names:
        path = folder / name
        try:
            recognise(path)
        except SomethingElse:
            others.append(name)
        except ValueError as error:
            if path.suffix.lower() in _SUFFIXES:
                found.failures.append((str(path), str(error)))
            else:
                others.append(name)
        else:
            found.files.append(path)
    if others and found.files:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        found.notes.append(f"no profiler report, left out: {', '.join(others[:3])}{more}")
    _keep_one_form(found)
    return found


def _keep_one_form(found: Recordings) -> None:
    """JAX writes one recording as xplane.pb, as trace.json.gz and for Perfetto; the first has the most."""
    stems = {path.name.removesuffix(".xplane.pb") for path in found.files if path.name.endswith(".xplane.pb")}
    if stems:
        again = {f"{stem}.trace.json.gz" for stem in stems} | {"perfetto_trace.json.gz"}
        left_out = [path.name for path in found.files if path.name in again]
        found.files = [path for path in found.files if path.name not in again]
        if left_out:
            found.notes.append(f"the same recording as xplane.pb, left out: {', '.join(left_out)}")


def _one_job(folder: Path, by_folder: dict[Path, Recordings]) -> Recordings:
    places = {place: found for place, found in by_folder.items() if found.files}
    failures = [failure for found in by_folder.values() for failure in found.failures]
    if folder in places:
        return places[folder]
    if len(places) > 1 and all(_DATED.fullmatch(place.name) for place in places):
        newest = max(places, key=lambda place: place.name)
        note = f"the newest of {len(places)} recordings: {newest.name}"
        return Recordings(places[newest].files, places[newest].failures, [note, *places[newest].notes])
    if len(places) > 1 and any(len(found.files) > 1 for found in places.values()):
        names = ", ".join(str(place.relative_to(folder)) for place in sorted(places)[:5])
        raise ValueError(f"{folder} holds reports of several jobs: name one of its subfolders ({names})")
    files = [path for found in places.values() for path in found.files]
    return Recordings(files, failures, [note for found in places.values() for note in found.notes])


def rank_in_name(path: str | Path) -> int:
    """The number after "rank" or "worker" in the file's name, else in its folder's; -1 without."""
    path = Path(path)
    for name in (path.name, path.parent.name):
        if found := _RANK.search(name):
            return int(found[1])
    return -1


def number_ranks(job: Job) -> None:
    """Every trace its rank: as its file says, else its file's name, else the order of names; and sorted."""
    if len(job.traces) > 1:
        unknown = [trace for trace in job.traces if trace.rank < 0]
        taken = {trace.rank for trace in job.traces}
        free = (rank for rank in range(len(job.traces) * 2) if rank not in taken)
        for trace, rank in zip(unknown, free, strict=False):
            trace.rank, trace.rank_made_up = rank, True
        if unknown:
            job.notes.append(f"{len(unknown)} files do not say their rank: numbered in order of their names")
    by_rank: defaultdict[int, list[str]] = defaultdict(list)
    for trace in job.traces:
        by_rank[trace.rank].append(Path(trace.source).name)
    for rank, names in sorted(by_rank.items()):
        if len(names) > 1:
            job.notes.append(f"rank {rank} is there {len(names)} times: {', '.join(names[:4])}")
    sizes = Counter(trace.world_size for trace in job.traces if trace.world_size > 0)
    if len(sizes) > 1:
        job.notes.append(f"the files disagree on the number of ranks: {', '.join(map(str, sorted(sizes)))}")
    elif sizes and len(by_rank) < next(iter(sizes)):
        job.notes.append(f"{len(by_rank)} of {next(iter(sizes))} ranks are there")
    job.traces.sort(key=lambda trace: (trace.rank, trace.source))
