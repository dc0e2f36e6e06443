"""Run a command so that nothing of it outlives whoever asked for it, not even after ``kill -9``.

``python -m bench.supervise -- COMMAND ...`` with a pipe as standard input: the pipe is the lifeline. When its
other end closes (the asker ended, however), or when the command ends by itself, every descendant that is left
is ended, first kindly, then with SIGKILL. On Linux this process is the "subreaper" of its descendants
(prctl(2), PR_SET_CHILD_SUBREAPER), so those whose own parent has died are found too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_SECONDS = 1.5


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _before_command() -> None:
    """In the child, before the command: fall with this process, and be open to SIGINT again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_descendants(grace_seconds: float = GRACE_SECONDS) -> None:
    """SIGTERM to every descendant, then SIGKILL to those that are left."""
    import psutil

    me = psutil.Process()
    deadline = time.monotonic() + grace_seconds
    first = True
    while True:
        living = [child for child in me.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
        if not living:
            return
        late = time.monotonic() > deadline
        for child in living:
            with contextlib.suppress(psutil.Error):
                if late:
                    child.kill()
                elif first:
                    child.terminate()
        first = False
        if time.monotonic() > deadline + 10:
            return  # in uninterruptible sleep: not even SIGKILL reaches it
        time.sleep(0.05)


def main() -> int:
    command = sys.argv[sys.argv.index("--") + 1 :]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Ctrl-C in a terminal reaches the whole group; the asker decides, by closing the lifeline.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_before_command,
    )
    lifeline = True
    while child.poll() is None and lifeline:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        lifeline = not readable or bool(os.read(sys.stdin.fileno(), 1))
    if child.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGINT)  # lets Python end its world and its pools itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    end_descendants()
    status = child.poll()
    return 1 if status is None else status if status >= 0 else 128 - status


def lines_of(path: str) -> list[str]:
    """What a supervised command has said so far."""
    with open(path, errors="replace") as file:
        return [line.strip() for line in file if line.strip()]


class Supervised:
    """A supervised command, as its asker holds it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: str) -> None:
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                # -P: what lies in the user's folder under a name of ours is not taken for it.
                [sys.executable, "-P", "-m", "bench.supervise", "--", *command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def poll(self) -> int | None:
        """The command's exit status (128 + signal when a signal ended it), or None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the command and everything it started; returns when they are gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(4 * GRACE_SECONDS + 15)


if __name__ == "__main__":
    sys.exit(main())
