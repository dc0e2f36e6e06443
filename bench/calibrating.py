"""This machine's constants for a command that needs them: kept ones, or new ones from a child process."""

from __future__ import annotations

import json
import sys
import tempfile
import time

from bench.environment import measuring_environment
from bench.progress import Progress
from bench.supervise import Supervised, lines_of
from labs.home import home
from labs.machine import Machine, load_cached

SILENCE_SECONDS = 240.0  # a calibration that says nothing for so long hangs


class CalibrationFailed(RuntimeError):
    """The machine's constants could not be measured; the message says what the process said last."""


def calibrated(progress: Progress, force: bool = False) -> tuple[Machine, str]:
    """This machine's constants: cached ones that still hold, or new ones; measured in a child process.

    ValueError where they could not be kept; CalibrationFailed where the child fails, or says nothing for
    ``SILENCE_SECONDS``.
    """
    if force or load_cached() is None:
        _check_home()
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/log"
        command = [sys.executable, "-P", "-m", "labs.calibration", *(["--force"] if force else [])]
        child = Supervised(command, measuring_environment("default", ""), log)
        progress.phase("calibration", "measuring this machine's constants")
        heard, said = time.monotonic(), 0
        try:
            while (status := child.poll()) is None:
                lines = lines_of(log)
                if len(lines) > said:
                    heard, said = time.monotonic(), len(lines)
                    progress.phase("calibration", lines[-1])
                if time.monotonic() - heard > SILENCE_SECONDS:
                    last = lines[-1] if lines else "it said nothing"
                    raise CalibrationFailed(f"no sign of life for {SILENCE_SECONDS:.0f} s: {last}")
                time.sleep(0.1)
        finally:
            child.end()
        machine = load_cached()
        lines = lines_of(log)
        if status or machine is None:
            raise CalibrationFailed(" | ".join(lines[-2:]) or f"exit status {status}")
    try:
        message = str(json.loads(lines[-1])["message"])
    except (ValueError, KeyError, TypeError, IndexError):
        message = ""
    progress.say(message or f"calibration: {machine.name}")
    return machine, message


def _check_home() -> None:
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            pass
    except OSError as error:
        raise ValueError(
            f"the machine's constants are kept in {home()}, which cannot be written ({error.strerror}); "
            "set PERFLAB_HOME to a folder that can"
        ) from None
