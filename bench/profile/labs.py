"""Which variant of a lab is meant, and its run under a profiler in processes of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.environment import allocator_environment
from bench.request import Request, settings_of
from bench.supervise import Supervised
from bench.world.protocol import without_launcher
from labs import load
from labs.lab import Lab, Scale, Variant, nearest

LIMIT_SECONDS = 300.0  # for setting one variant up, its calls, and writing the reports


def choose(
    target: str, scale: Scale, overrides: dict[str, str], processes: int
) -> tuple[Lab, Any, list[Variant], str]:
    """(lab, its config, the variants meant, a sentence that says which) for ``LAB[:VARIANT]``.

    VARIANT is ``group/name``, or a name. A name that several groups have means the one whose group is timed
    repeatedly (the others count bytes or run once), if there is one such; else ValueError lists them.
    """
    name, _, wanted = target.partition(":")
    lab = load(name)
    request = Request(labs=(name,), scale=scale, overrides=overrides, processes=processes)
    config = lab.config(**settings_of(request)[name])
    every = list(lab.variants(config))
    if not wanted:
        found = [variant for variant in every if variant.max_rounds != 1 and not variant.unavailable] or every
        return lab, config, found, f"{name}: {len(found)} variants"
    found = [variant for variant in every if wanted in (variant.address, variant.name)]
    if not found:
        words = [variant.address for variant in every]
        names = [variant.name for variant in every if variant.name not in words]
        raise ValueError(
            f"{name} has no variant {wanted!r}{nearest(wanted, [*words, *dict.fromkeys(names)])}"
        )
    named = [variant.address for variant in found]
    timed = [variant for variant in found if variant.max_rounds != 1] if len(found) > 1 else found
    if len(timed) != 1:
        raise ValueError(f"{name} has several variants {wanted!r}: name one of {', '.join(named)}")
    if timed[0].unavailable:
        raise ValueError(f"{name}:{timed[0].address} cannot run here: {timed[0].unavailable}")
    others = [address for address in named if address != timed[0].address]
    note = f"{name}:{timed[0].address}"
    return lab, config, timed, note + (f" (not {', '.join(others)})" if others else "")


def record(lab: Lab, config: Any, variant: Variant, folder: Path, kind: str, steps: int) -> str:
    """Run the variant's ranks until their reports are in ``folder``; what went wrong, or an empty string."""
    settings = json.dumps(
        {
            "lab": lab.name,
            "config": asdict(config),
            "address": variant.address,
            "output": str(folder.resolve()),
            "kind": kind,
            "steps": steps,
        }
    )
    command = [sys.executable, "-m"]
    if variant.processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(variant.processes), "-m"]
    command += ["bench.profile.variant", settings]
    environment = {**without_launcher(os.environ), **allocator_environment(lab.columns[0])}
    environment["PYTHONSAFEPATH"] = "1"  # a bench.py of the user's folder is not taken for ours
    with tempfile.TemporaryDirectory() as scratch:
        log = f"{scratch}/log"
        child = Supervised(command, environment, log)
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            while (status := child.poll()) is None:
                if time.monotonic() > deadline:
                    return (
                        f"{variant.processes} rank{'s' * (variant.processes > 1)} "
                        f"did not finish {steps} steps within {LIMIT_SECONDS:.0f} s"
                    )
                time.sleep(0.05)
        finally:
            child.end()
        if status:
            return _last_words(log) or f"the ranks ended with status {status}"
    return ""


def _last_words(log: str) -> str:
    """The line in which a rank said what was wrong, else the last ones."""
    with open(log, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    said = [line for line in lines if line.startswith("perflab: ")]
    return said[0].removeprefix("perflab: ") if said else " | ".join(lines[-2:])[-300:]
