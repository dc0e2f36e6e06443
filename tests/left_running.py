"""Which processes still run, for tests that leave none behind."""

import time
from contextlib import suppress

import psutil


def children():
    """Process ids of all descendants but what multiprocessing keeps for as long as this process lives."""
    found = set()
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended since it was listed
            if "resource_tracker" not in " ".join(each.cmdline()):
                found.add(each.pid)
    return found


def left_running(pids, seconds=20.0):
    """Waits until none of the processes runs, so long at most; those that still do."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def runs(pid):
    """A zombie has ended; its parent has not asked yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
