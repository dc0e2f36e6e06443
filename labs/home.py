"""Where perflab keeps what it learned about machines."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of this user (``PERFLAB_HOME`` overrides)."""
    chosen = os.environ.get("PERFLAB_HOME")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perflab"


def calibrations() -> list[Path]:
    """The files of all calibrated machines that share this home."""
    return sorted(home().glob("machine-*.json"))
