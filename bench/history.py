"""Results kept per machine, so that today's run can be held against the last one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.results import load, write
from labs import NAMES
from labs.home import home
from labs.lab import nearest
from labs.machine import fingerprint

KEPT = 100  # files a machine; the oldest go


def folder() -> Path:
    return home() / "history" / fingerprint()


def keep(results: Mapping[str, Any]) -> Path | None:
    """Store a finished run; None when the folder cannot be written (the results file is safe elsewhere).

    The name is the time it started, a number where another run started in that second, and the labs:
    20261122T201500-2_a+b.json.
    """
    labs = "+".join(results["perflab"]["labs"])
    stamp = results["perflab"]["started"].replace(":", "").replace("-", "")[:15]
    try:
        folder().mkdir(parents=True, exist_ok=True)
        before = max((_when(path)[1] for path in _kept() if _when(path)[0] == stamp), default=0)
        path = folder() / f"{stamp}{f'-{before + 1}' if before else ''}_{labs}.json"
        write(results, path)
        for old in _kept()[:-KEPT]:
            old.unlink()
        return path
    except OSError:
        return None


def _kept() -> list[Path]:
    """The oldest first; of runs that began in one second in the order of their numbers."""
    return sorted(folder().glob("*.json"), key=_when)


def _when(path: Path) -> tuple[str, int]:
    """The second in which a run began, and its number in it."""
    stamp, _, number = path.stem.partition("_")[0].partition("-")
    return stamp, int(number) if number.isdecimal() else 1


def _labs_of(path: Path) -> list[str]:
    return path.stem.partition("_")[2].split("+")


def last(count: int, lab: str) -> list[Path]:
    """The newest ``count`` results of this machine that hold the lab, oldest first."""
    kept = _kept()[::-1]
    known = dict.fromkeys([*NAMES, *(name for path in kept for name in _labs_of(path))])
    if lab not in known:
        raise ValueError(f"there is no lab {lab!r}{nearest(lab, list(known))}")
    found = []
    for path in kept:
        if lab in _labs_of(path):
            try:
                load(path)
            except ValueError:  # cut short by a full disk, say: the next older one will do
                continue
            found.append(path)
        if len(found) == count:
            return found[::-1]
    raise ValueError(
        f"the history of this machine holds {len(found)} results of {lab}, not {count}; perflab run {lab}"
    )
