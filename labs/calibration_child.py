"""A part of the calibration in a process of its own (``labs.calibration_processes`` and ``_links``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def figures_of(module: str, limit_s: float) -> dict[str, tuple[float, str]]:
    """name -> (value, source), which ``python -m module`` prints as JSON. RuntimeError: it fails, or does not
    end within ``limit_s`` seconds."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module],
            capture_output=True, text=True, timeout=limit_s, env=environment, check=True,
        )  # fmt: skip
        return {name: (float(value), source) for name, (value, source) in json.loads(done.stdout).items()}
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{module} failed: {reason}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} did not end within {limit_s:.0f} s") from None
