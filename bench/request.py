"""What the user asked for, and whether it can be done: labs, settings, sizes, where results go."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from labs import NAMES, load
from labs.lab import Scale, configure, nearest


@dataclass(frozen=True)
class Request:
    """What the user asked for, not yet checked."""

    labs: Sequence[str] = ()
    scale: Scale = "normal"
    overrides: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    sheets: Sequence[str] = ()
    processes: int = 0
    output: Path = Path("results.json")
    resume: bool = False


def says_what_is_wrong(error: BaseException) -> bool:
    """Whether perflab's code, or that of a lab in the current folder, raised this to say what is wrong with
    the input. Any other ValueError or TypeError (of ``int()``, of NumPy, of a call with wrong arguments) is a
    fault that its traceback helps to find."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    file = Path(frames[-1].filename).resolve()
    ours = Path(__file__).resolve().parents[1]
    known = [ours / name for name in ("bench", "labs", "kernels", "parallel")]
    known += [] if "site-packages" in file.parts else [Path.cwd()]
    return (frames[-1].line or "").startswith("raise ") and any(map(file.is_relative_to, known))


def settings_of(request: Request) -> dict[str, dict[str, Any]]:
    """Each lab's settings; ValueError for unknown labs, settings and sizes the machine cannot hold."""
    names = list(dict.fromkeys(request.labs)) or list(NAMES)
    labs = {name: load(name) for name in names}
    known = {name: {item.name for item in fields(lab.config)} for name, lab in labs.items()}
    overrides: dict[str, dict[str, Any]] = {name: {} for name in names}
    if request.processes:
        for name in names:
            if "ranks" in known[name]:
                overrides[name]["ranks"] = request.processes
        if not any("ranks" in keys for keys in known.values()):
            raise ValueError(f"--nproc: none of {', '.join(names)} runs a world of processes")
    for key, value in request.overrides.items():
        chosen, _, setting = key.rpartition(".")
        if chosen and chosen not in labs:
            raise ValueError(f"--set {key}: there is no lab {chosen!r} in this run{nearest(chosen, names)}")
        takers = [name for name in names if setting in known[name] and chosen in ("", name)]
        if not takers:
            every = sorted(set().union(*known.values()))
            raise ValueError(f"--set {key}: there is no setting {setting!r}{nearest(setting, every)}")
        for name in takers:
            overrides[name][setting] = value
    settings = {}
    for name, lab in labs.items():
        config = configure(lab, request.scale, overrides[name])
        _refuse_too_large(name, lab.memory_bytes(config))
        settings[name] = asdict(config)
    return settings


def _refuse_too_large(name: str, needed: float) -> None:
    import psutil

    available = psutil.virtual_memory().available
    if needed > 0.8 * available:
        raise ValueError(
            f"{name} would need {needed / 2**30:.1f} GiB of memory at these settings, and "
            f"{available / 2**30:.1f} GiB are free; use smaller sizes, see perflab list"
        )


def page_path(results: Path) -> Path:
    """Where the page of a results file is written when nothing else is said; ValueError where that is the
    results file itself."""
    page = results.with_suffix(".html")
    if page == results:
        raise ValueError(
            f"{results}: the page would be written over the results; call them {results.stem}.json"
        )
    return page


def check_output(path: Path) -> None:
    """ValueError when results cannot be written there, or their page beside them."""
    folder = path.parent if str(path.parent) else Path()
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file")
    page_path(path)
    if not folder.is_dir():
        raise ValueError(f"--output {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {path}: the folder {folder.resolve()} cannot be written ({error.strerror})"
        ) from None
