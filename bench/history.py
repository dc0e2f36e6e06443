"""Results kept per machine, so that today's run can be held against the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.results import load, write
from labs import NAMES
from labs.lab import nearest
from labs.machine import fingerprint, home

KEPT = 100  # files a machine; the oldest go


def folder() -> Path:
    return home() / "history" / fingerprint()


def keep(results: Mapping[str, Any]) -> Path | None:
    """Store a finished run; None when the folder cannot be written (the results file is safe elsewhere)."""
    labs = "+".join(results["perflab"]["labs"])
    stamp = results["perflab"]["started"].replace(":", "").replace("-", "")[:15]
    try:
        folder().mkdir(parents=True, exist_ok=True)
        path = folder() / f"{stamp}_{labs}.json"
        number = 1
        while path.exists():
            number += 1
            path = folder() / f"{stamp}_{number}_{labs}.json"
        write(results, path)
        for old in sorted(folder().glob("*.json"))[:-KEPT]:
            old.unlink()
        return path
    except OSError:
        return None


def last(count: int, lab: str) -> list[Path]:
    """The newest ``count`` results of this machine that hold the lab, oldest first."""
    if lab not in NAMES:
        raise ValueError(f"there is no lab {lab!r}{nearest(lab, NAMES)}")
    found = []
    for path in sorted(folder().glob("*.json"), reverse=True):
        if lab in path.stem.split("_")[-1].split("+"):
            try:
                load(path)
            except (ValueError, json.JSONDecodeError):
                continue
            found.append(path)
        if len(found) == count:
            return found[::-1]
    raise ValueError(
        f"the history of this machine holds {len(found)} results of {lab}, not {count}; perflab run {lab}"
    )
