"""``torchrun -m labs.X``: the ranks that torchrun started are the world that the lab's runner uses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

from bench.world import protocol
from bench.world.rank import serve


def join() -> int:
    """Become a rank of a world whose controller is the lab's runner, a child of rank 0.

    Returns the runner's exit status on rank 0, 0 elsewhere.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=protocol.COLLECTIVE_SECONDS))
    rank, size = dist.get_rank(), dist.get_world_size()
    store = protocol.open_store() if rank == 0 else None
    port = [store.port if store is not None else 0]
    dist.broadcast_object_list(port)
    status = 0
    if store is not None:
        environment = protocol.without_launcher(os.environ)
        environment.pop("OMP_NUM_THREADS", None)  # torchrun's 1 is for ranks; the runner measures threads too
        environment[protocol.ADDRESS] = protocol.address_of(port[0], size)
        runner = subprocess.Popen([sys.executable, "-m", *sys.orig_argv[_module_index() :]], env=environment)
        with _stopping(port[0], runner):
            serve(store)
        status = runner.wait(60.0)
    else:
        serve(protocol.connect("127.0.0.1", port[0]))
    dist.destroy_process_group()
    return status


def _module_index() -> int:
    """Where ``-m labs.X`` has its module name in this process's command line."""
    return sys.orig_argv.index("-m") + 1


@contextlib.contextmanager
def _stopping(port: int, runner: subprocess.Popen[bytes]) -> Iterator[None]:
    """Send ``stop`` to all ranks when the runner has ended.

    A rank 0 that does not come back from its step to read it is ended: else torchrun would wait for ever. It
    ends the other ranks when rank 0's exit status is not 0.
    """
    own = protocol.connect("127.0.0.1", port)
    served = threading.Event()

    def watch() -> None:
        status = runner.wait()
        protocol.send(own, "stop")
        if not served.wait(protocol.GRACE_SECONDS):
            print("perflab: rank 0 hangs in its step and is ended", file=sys.stderr, flush=True)
            os._exit(status or 1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        served.set()
        if runner.poll() is None:
            runner.terminate()
        thread.join(10.0)
