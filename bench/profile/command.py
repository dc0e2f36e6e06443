"""``perflab profile``: what is asked for, where the reports go, and what is said at the end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.profile.recorders import RECORDERS
from labs.lab import Scale, nearest

PROFILERS = {".json.gz": "torch.profiler", ".xplane.pb": "jax.profiler", ".prof": "cProfile"}


def profile_program(
    words: Sequence[str], kind: str, output: Path | None, memory: bool = True, quiet: bool = False
) -> int:
    """Run a Python program under a profiler; its own exit status. memory: see ``TorchRecorder``. quiet: what
    it prints goes to stderr, because stdout is for another's answer."""
    from bench.profile.launch import parse, run, signals_held

    _check_kind(kind)
    with signals_held() as before:
        program = parse(words)
        folder = _folder(output, program.name)
        created = _create(folder)
        settings = json.dumps({"output": str(folder.resolve()), "kind": kind, "memory": memory})
        try:
            status = run(program.profiled(settings), before, sys.stderr.fileno() if quiet else None)
        finally:
            found = _reports(folder)
            if created:
                _remove_if_empty(folder)
    if not found:
        say("no report was written")
    else:
        _say_where(folder, found)
    return status


def profile_lab(
    target: str,
    kind: str,
    output: Path | None,
    *,
    scale: Scale,
    overrides: dict[str, str],
    processes: int,
    steps: int,
) -> int:
    """Profile a variant of a lab, or all that it times repeatedly, each in a folder of its own."""
    from bench.profile.labs import choose, record

    _check_kind(kind)
    lab, config, variants, note = choose(target, scale, overrides, processes)
    whole = ":" not in target
    folder = _folder(output, target.replace(":", "-").replace("/", "-"))
    _create(folder)
    say(note)
    failed = 0
    for variant in variants:
        place = folder / variant.address.replace("/", "-") if whole else folder
        place.mkdir(parents=True, exist_ok=True)
        try:
            problem = record(lab, config, variant, place, kind, steps)
            if problem:
                failed += 1
                say(f"{lab.name}:{variant.address}: {problem}")
            else:
                _say_where(place, _reports(place))
        finally:
            for empty in (place, folder):
                _remove_if_empty(empty)
    return 1 if failed else 0


def _check_kind(kind: str) -> None:
    if kind and kind not in RECORDERS:
        raise ValueError(f"--kind {kind!r} is unknown{nearest(kind, list(RECORDERS))}")


def _folder(output: Path | None, name: str) -> Path:
    """Where the reports go: ``output``, empty or not there yet; else profile-NAME, or profile-NAME-2, -3 ...

    Reports of two runs in one folder would be read as ranks of one job.
    """
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output {output} is there already, and not an empty folder; name a new one")
        return output
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    folder, count = Path(f"profile-{name}"), 1
    while folder.exists():
        count += 1
        folder = Path(f"profile-{name}-{count}")
    return folder


def _create(folder: Path) -> bool:
    """True when it was not there."""
    try:
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: the folder cannot be made ({error.strerror})") from None
    return created


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _reports(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _say_where(folder: Path, found: Sequence[Path]) -> None:
    kinds = dict.fromkeys(name for end, name in PROFILERS.items() if any(p.name.endswith(end) for p in found))
    names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
    say(f"{len(found)} report{'s' * (len(found) != 1)} of {' and '.join(kinds)} in {folder}: {names}")
    say(f"read it with: perflab trace {shlex.quote(str(folder))}")


def say(text: str) -> None:
    """On stderr: the program's output may be read by another."""
    print(f"perflab: {text}", file=sys.stderr)
