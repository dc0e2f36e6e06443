"""A file is either the old one or the whole new one, whatever stops the writing."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(text: str, path: str | os.PathLike[str]) -> Path:
    """Write beside the place and move there; OSError when that fails, which leaves nothing behind."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise
    return target
