"""Nothing outlives the asker: not a child, not a grandchild that left its parent, not after kill -9."""

import subprocess
import sys
import time

import pytest
from left_running import left_running

from bench.supervise import Supervised

# A child that starts a grandchild in a session of its own, ignores SIGTERM, and says both process ids.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print(os.getpid(), grandchild.pid, flush=True)
{then}
"""


def started(log, seconds=20):
    deadline = time.monotonic() + seconds
    while not (text := log.read_text() if log.exists() else "").strip():
        assert time.monotonic() < deadline, "the command did not start"
        time.sleep(0.02)
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("then", ["time.sleep(100)", "os._exit(3)"])
def test_end_ends_every_descendant(tmp_path, then):
    log = tmp_path / "log"
    child = Supervised([sys.executable, "-c", STUBBORN.format(then=then)], {}, str(log))
    pids = started(log)
    if then == "os._exit(3)":
        while child.poll() is None:
            time.sleep(0.05)
        assert child.poll() == 3
    child.end()
    assert not left_running(pids)


def test_kill_9_of_the_asker_ends_everything(tmp_path):
    log = tmp_path / "log"
    stubborn = [sys.executable, "-c", STUBBORN.format(then="time.sleep(100)")]
    code = f"""
import time
from bench.supervise import Supervised
child = Supervised({stubborn!r}, {{}}, {str(log)!r})
time.sleep(100)
"""
    asker = subprocess.Popen([sys.executable, "-c", code])
    pids = started(log)
    asker.kill()
    asker.wait(10)
    assert not left_running(pids)


@pytest.mark.proof
def test_a_command_ended_by_a_signal_says_which(tmp_path):
    child = Supervised(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], {}, str(tmp_path / "log")
    )
    while child.poll() is None:
        time.sleep(0.02)
    child.end()
    assert child.poll() == 128 + 11
