"""How the tests run the command: the real one, in a folder of its own, with labs of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

TINY_LAB = Path(__file__).parent / "tiny_lab.py"
PERFLAB = [sys.executable, "-m", "bench.cli"]


def bring_labs(folder, *names):
    """Put copies of the tiny lab into the folder, as another repository would hold its own labs."""
    for name in names:
        shutil.copy(TINY_LAB, folder / f"{name}.py")


def perflab(*arguments, folder, timeout=120):
    """Run the command; (exit status, stdout, stderr)."""
    done = subprocess.run(
        [*PERFLAB, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


def read(path):
    return json.loads(Path(path).read_text())
