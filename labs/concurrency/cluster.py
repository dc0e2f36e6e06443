"""One small Ray cluster, shared by all Ray variants of a process.

``ray.init`` starts half a dozen processes and takes seconds, so it happens once, when the first Ray
variant is set up, and its duration is kept as the start-up cost.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from labs.concurrency.pools import PATIENCE_S, lean_main
from labs.lab import Recorder

OBJECT_STORE_BYTES = 256 * 2**20


def unavailable() -> str:
    """Why Ray cannot be used here, or ``""``. Does not import it (that takes most of a second)."""
    return "" if importlib.util.find_spec("ray") else "Ray is not installed (pip install ray)"


def _family() -> list[tuple[int, float]]:
    """Number and time of creation of every process below this one."""
    import psutil

    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append((each.pid, each.create_time()))
    return found


def _guard(processes: list[tuple[int, float]], folder: str) -> None:
    """Waits until the process that has the cluster is gone, then removes what it could not.

    Ray's agents look for their scheduler only now and then: after a ``kill -9`` they stay a minute or two.

    processes: numbers and times of creation, so that a number used again is not taken for it.
    """
    import psutil

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this one goes last
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
    for number, created in processes:
        with suppress(psutil.Error):
            process = psutil.Process(number)
            if process.create_time() == created:
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """A Ray cluster on this machine and the seconds its start took."""

    def __init__(self, workers: int, recorder: Recorder, gpus: int = 0) -> None:
        # Read by Ray when it is imported: no report of use goes out.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as it will be; silences a warning
        import ray

        # Sockets lie in this folder, and a socket's path has to be shorter than 108 bytes.
        self.folder = tempfile.TemporaryDirectory(prefix="perflab-ray-", ignore_cleanup_errors=True)
        self.workers = workers
        self.remotes: dict[Callable[..., Any], Any] = {}
        before = {number for number, _ in _family()}
        begin = recorder.now()
        ray.init(
            address="local",
            num_cpus=workers,
            num_gpus=gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self.folder.name,
        )
        self.start_s = recorder.now() - begin
        self._set_guard(before)

    def _set_guard(self, before: set[int]) -> None:
        family = [(number, created) for number, created in _family() if number not in before]
        context = multiprocessing.get_context("spawn")
        self.guard = context.Process(target=_guard, args=(family, self.folder.name), daemon=True)
        with lean_main():
            self.guard.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        import ray

        if function not in self.remotes:
            self.remotes[function] = ray.remote(num_cpus=1)(function)
        return self.remotes[function].remote(*arguments)

    def run(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """``function(*each)`` for each of ``arguments``, a Ray task each; TimeoutError when late."""
        import ray

        found = [self.submit(function, *each) for each in arguments]
        try:
            return ray.get(found, timeout=PATIENCE_S)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {len(found)} Ray tasks") from None

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.folder.cleanup()
        self.guard.kill()
        self.guard.join(PATIENCE_S)


_cluster: list[Cluster] = []


def cluster(workers: int, recorder: Recorder) -> Cluster:
    """The process's cluster, started at the first call, and anew where it has another number of workers: the
    labs of one run ask for as many as each is configured to have."""
    if _cluster and _cluster[0].workers != workers:
        shut_down()
    if not _cluster:
        _cluster.append(Cluster(workers, recorder))
        atexit.register(shut_down)
        # Each worker process has started and imported what tasks need before anything is timed.
        from labs.concurrency import workers as tasks

        _cluster[0].run(tasks.hello, [(0.2,)] * workers)
    return _cluster[0]


def shut_down() -> None:
    """Ends the cluster and removes its files; nothing happens when there is none."""
    atexit.unregister(shut_down)
    while _cluster:
        _cluster.pop().close()
