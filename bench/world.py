"""A world of processes that stays alive between rounds, so that multi-process variants are timed without
starting processes in every round.

The controller (the process that measures) writes commands into a ``TCPStore``; every rank of the world
sits in ``serve`` and answers. A variant is addressed by (lab, settings, ``group/name``): no closure crosses
a process. A sample begins behind a barrier, and its time is the slowest rank's.

The ranks are started by torch's own launcher agent, or, under ``torchrun -m labs.X``, are the processes that
torchrun started (``join``). Every wait has a time-out that says who waits for whom.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from labs.lab import Variant

ADDRESS = "PERFLAB_WORLD"  # host:port/size of a running world's store
START_SECONDS, ANSWER_SECONDS = 120.0, 120.0
_CALL = "command"


class World:
    """The controller's side of a world of ``size`` ranks."""

    def __init__(self, size: int, answer_seconds: float = ANSWER_SECONDS) -> None:
        from torch.distributed import TCPStore

        self.size, self.answer_seconds, self._number = size, answer_seconds, 0
        self._agent: subprocess.Popen[bytes] | None = None
        self.broken = False  # a rank did not answer: it may answer an old question later
        self.recorded: dict[str, dict[str, list[float]]] = {}  # address -> what rank 0 recorded last
        self.texts: dict[str, dict[str, str]] = {}  # address -> the texts that rank 0 kept
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        joined = os.environ.get(ADDRESS)
        if joined:
            host, port, joined_size = _parse(joined)
            if joined_size != size:
                raise ValueError(
                    f"this variant runs on {size} ranks, but torchrun started {joined_size}; "
                    f"use --nproc-per-node {size}"
                )
            self._store = TCPStore(host, port, None, False, timedelta(seconds=START_SECONDS))
            self._number = self._store.add("commands", 0)
        else:
            self._store = TCPStore(
                "127.0.0.1", 0, None, True, timedelta(seconds=START_SECONDS), wait_for_workers=False
            )
            self._launch()
        self._ask("hello", START_SECONDS)

    def _launch(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"]
        command += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "--rdzv-id",
            f"perflab-{os.getpid()}",
        ]
        command += ["--nproc-per-node", str(self.size), "-m", "bench.world"]
        environment = {**os.environ, ADDRESS: f"127.0.0.1:{self._store.port}/{self.size}"}
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._agent = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    def _ask(self, operation: str, seconds: float | None = None, **content: Any) -> list[dict[str, Any]]:
        """Send one command to every rank and wait for all answers."""
        limit = self.answer_seconds if seconds is None else seconds
        number = self._store.add("commands", 1)
        self._store.set(f"{_CALL}/{number}", json.dumps({"operation": operation, **content}))
        answers, deadline = [], time.monotonic() + limit
        for rank in range(self.size):
            key = f"answer/{number}/{rank}"
            while True:
                left = deadline - time.monotonic()
                with contextlib.suppress(Exception):
                    self._store.wait([key], timedelta(seconds=max(0.01, min(1.0, left))))
                    break
                if self._agent is not None and self._agent.poll() is not None:
                    self.broken = True
                    raise RuntimeError(f"the world ended during {operation!r}: {self._last_words()}")
                if left <= 0:
                    self.broken = True
                    raise TimeoutError(
                        f"the controller waits for rank {rank} of {self.size} to answer {operation!r} "
                        f"{content.get('address', '')}: nothing within {limit:.0f} s"
                    )
            answer = pickle.loads(self._store.get(key))
            self._store.delete_key(key)
            answers.append(answer)
        self._store.delete_key(f"{_CALL}/{number}")
        for rank, answer in enumerate(answers):
            if answer.get("error"):
                raise RuntimeError(f"rank {rank} of {self.size}: {answer['error']}")
        return answers

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"

    def _keep(self, address: str, answer: dict[str, Any]) -> None:
        self.recorded[address], self.texts[address] = answer["recorded"], answer["texts"]

    def set_up(self, lab: str, settings: dict[str, Any], address: str) -> None:
        answers = self._ask("set_up", lab=lab, settings=settings, address=address)
        self._keep(address, answers[0])

    def sample(self, address: str, iterations: int) -> float:
        """Seconds of one step, averaged over ``iterations``: the slowest rank's."""
        answers = self._ask("sample", address=address, iterations=iterations)
        self._keep(address, answers[0])
        return max(answer["seconds"] for answer in answers)

    def call(self, address: str) -> Any:
        """Run the step once on every rank; rank 0's output (torch tensors come as NumPy arrays)."""
        answer = self._ask("call", address=address)[0]
        self._keep(address, answer)
        return answer["output"]

    def profile(self, address: str, steps: int, folder: str) -> None:
        """Each rank's report of so many steps, in ``folder``."""
        self._ask("profile", address=address, steps=steps, folder=folder)

    def tear_down(self, address: str) -> None:
        self._ask("tear_down", address=address)

    def close(self) -> None:
        """End the ranks: asked to stop when they still answer, else ended."""
        if self._agent is not None:
            if not self.broken:
                with contextlib.suppress(Exception):
                    self._ask("stop", 5.0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._agent.wait(10.0)
            _end(self._agent)
        self._log.close()


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End the launcher agent and its ranks, at once if need be."""
    import psutil

    if agent.poll() is not None:
        return
    ranks = psutil.Process(agent.pid).children(recursive=True)
    for process in [*ranks, psutil.Process(agent.pid)]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(ranks, timeout=10)
    agent.wait(10.0)


class WorldStep:
    """A step that runs on every rank of a world: a lab's variant, or, with lab="", what the importable
    function ``package.module:function`` returns."""

    def __init__(self, world: World, lab: str, settings: dict[str, Any], address: str) -> None:
        self._world, self._address = world, address
        world.set_up(lab, settings, address)

    def __call__(self) -> Any:
        return self._world.call(self._address)

    def sample(self, iterations: int) -> float:
        return self._world.sample(self._address, iterations)

    def profile(self, steps: int, folder: str) -> None:
        self._world.profile(self._address, steps, folder)

    @property
    def recorded(self) -> dict[str, list[float]]:
        """What rank 0 recorded in its setup and its last call or sample."""
        return self._world.recorded.get(self._address, {})

    @property
    def texts(self) -> dict[str, str]:
        """The texts that rank 0 kept."""
        return self._world.texts.get(self._address, {})

    def close(self) -> None:
        self._world.tear_down(self._address)


class WorldClock:
    """Times a WorldStep inside its ranks: the command's way there and back is not part of it."""

    # A sample lasts at least this long: ranks leave the barrier before it some 0.1 to 1 ms apart, and a small
    # collective of some 10 us would be that wait.
    least_seconds = 10e-3

    def sample(self, step: Callable[[], object], iterations: int) -> float:
        assert isinstance(step, WorldStep)
        return step.sample(iterations)

    def wait(self, output: object) -> None:
        return


class Worlds:
    """Worlds by size, started when first needed and kept until ``close``."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def of_size(self, size: int) -> World:
        if size in self._worlds and self._worlds[size].broken:
            self._worlds.pop(size).close()
        if size not in self._worlds:
            self._worlds[size] = World(size)
        return self._worlds[size]

    def step(self, lab: str, config: Any, variant: Variant) -> WorldStep:
        return WorldStep(self.of_size(variant.processes), lab, asdict(config), variant.address)

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()


# --- the ranks' side -----------------------------------------------------------------------------


def _parse(address: str) -> tuple[str, int, int]:
    host, rest = address.rsplit(":", 1)
    port, size = rest.split("/")
    return host, int(port), int(size)


def _imported(address: str) -> Callable[[], Callable[[], object]]:
    """The function at ``package.module:function``; modules of the current folder count."""
    from importlib import import_module

    module, _, function = address.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(import_module(module), function)


def joined_size() -> int:
    """Ranks of the world that torchrun started and this process measures with; 0 without one."""
    return _parse(os.environ[ADDRESS])[2] if ADDRESS in os.environ else 0


class _Rank:
    """What one rank knows: the steps that were set up, and what they record."""

    def __init__(self) -> None:
        from bench.measure import RoundRecorder

        self._steps: dict[str, Callable[[], object]] = {}
        self._recorders: defaultdict[str, RoundRecorder] = defaultdict(RoundRecorder)

    def set_up(self, lab: str, settings: dict[str, Any], address: str) -> dict[str, Any]:
        from labs import load
        from labs.lab import find

        recorder = self._recorders[address]
        if not lab:
            self._steps[address] = _imported(address)()
        else:
            declared = load(lab)
            config = declared.config(**settings)
            self._steps[address] = find(declared, config, address).setup(config, recorder)
        return {"recorded": recorder.values, "texts": recorder.texts}

    def call(self, address: str) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        recorder = self._recorders[address]
        recorder.begin_round()
        output = self._steps[address]()
        if isinstance(output, torch.Tensor):
            output = output.detach().cpu().numpy()
        return {
            "output": output if dist.get_rank() == 0 else None,
            "recorded": recorder.values,
            "texts": recorder.texts,
        }

    def sample(self, address: str, iterations: int) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        step, recorder = self._steps[address], self._recorders[address]
        recorder.begin_round()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / iterations
        return {"seconds": seconds, "recorded": recorder.values, "texts": recorder.texts}

    def profile(self, address: str, steps: int, folder: str) -> dict[str, Any]:
        import torch.distributed as dist

        from bench.profile.steps import record

        record(self._steps[address], steps, Path(folder) / f"rank{dist.get_rank()}.json.gz", dist.barrier)
        return {}

    def tear_down(self, address: str) -> dict[str, Any]:
        self._recorders.pop(address, None)
        close = getattr(self._steps.pop(address, None), "close", None)
        if close is not None:
            close()
        return {}

    def hello(self) -> dict[str, Any]:
        return {}

    def stop(self) -> dict[str, Any]:
        return {}


def serve(store: Any, idle_seconds: float = 3600.0) -> None:
    """Answer commands until ``stop``, until the store is gone, or after an hour without a command.

    torch.distributed must be initialised; ``store`` is the controller's TCPStore.
    """
    import torch.distributed as dist

    from bench.measure import explain

    rank, me, number = dist.get_rank(), _Rank(), 0
    while True:
        number += 1
        key = f"{_CALL}/{number}"
        store.wait([key], timedelta(seconds=idle_seconds))
        request = json.loads(store.get(key))
        operation = request.pop("operation")
        try:
            answer = getattr(me, operation)(**request)
        except Exception as error:
            answer = {"error": explain(error)}
        store.set(f"answer/{number}/{rank}", pickle.dumps(answer))
        if operation == "stop":
            return


def join() -> int:
    """Under ``torchrun -m labs.X``: become a world that the lab's runner, a child of rank 0, measures with.

    Returns the runner's exit status on rank 0, 0 elsewhere.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore

    dist.init_process_group("gloo", timeout=timedelta(seconds=START_SECONDS))
    rank, size = dist.get_rank(), dist.get_world_size()
    wait = timedelta(seconds=START_SECONDS)
    store = TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store is not None else 0]
    dist.broadcast_object_list(port)
    if store is None:
        store = TCPStore("127.0.0.1", port[0], None, False, wait)
    status = 0
    if rank == 0:
        outside = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in outside}
        environment[ADDRESS] = f"127.0.0.1:{port[0]}/{size}"
        runner = subprocess.Popen([sys.executable, "-m", *sys.orig_argv[_module_index() :]], env=environment)
        with _stopping(store, runner):
            serve(store)
        status = runner.wait(60.0)
    else:
        serve(store)
    dist.destroy_process_group()
    return status


def _module_index() -> int:
    """Where ``-m labs.X`` has its module name in this process's command line."""
    return sys.orig_argv.index("-m") + 1


@contextlib.contextmanager
def _stopping(store: Any, runner: subprocess.Popen[bytes]) -> Any:
    """Send ``stop`` to all ranks when the runner has ended."""
    import threading

    from torch.distributed import TCPStore

    # A client of its own: a store's connection serves one call at a time, and serve() sits in wait().
    own = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=START_SECONDS))

    def watch() -> None:
        runner.wait()
        number = own.add("commands", 1)
        own.set(f"{_CALL}/{number}", json.dumps({"operation": "stop"}))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        if runner.poll() is None:
            runner.terminate()
        thread.join(10.0)


def main() -> None:
    """A rank started by the launcher agent (``python -m bench.world``)."""
    import torch.distributed as dist
    from torch.distributed import TCPStore

    host, port, _ = _parse(os.environ[ADDRESS])
    dist.init_process_group("gloo", timeout=timedelta(seconds=ANSWER_SECONDS))
    store = TCPStore(host, port, None, False, timedelta(seconds=START_SECONDS))
    with contextlib.suppress(dist.DistNetworkError):  # the controller is gone: so are we
        serve(store)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
