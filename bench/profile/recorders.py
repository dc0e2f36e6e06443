"""The three profilers behind one interface: ``start``, run, ``stop(path)``.

Imports nothing heavy and nothing of perflab: ``bench/profile/child.py`` loads this file into the interpreter
of the program that is profiled, which may have no perflab.

A report is written under another name and then renamed: what is killed while it writes leaves no half report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol


class Recorder(Protocol):
    suffix: str  # of its reports' names
    steps_marked: bool  # ``step`` leaves a mark in the report

    def start(self) -> None:
        """Begin to record, now or (JAX) when the program first computes."""

    def step(self) -> None:
        """One step of the program's loop has ended."""

    def stop(self, path: Path) -> bool:
        """Stop and write the report to ``path``; False when nothing was recorded."""


def part_of(path: Path) -> Path:
    """Where a report is written until it is whole; hidden, with the suffix that the profilers go by."""
    return path.with_name(f".part-{os.getpid()}-{path.name}")


def _process() -> Any:
    """The module beside this one, which has no package in a program's interpreter."""
    spec = importlib.util.spec_from_file_location("_perflab_process", Path(__file__).with_name("process.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _compiler_left_alone() -> Iterator[None]:
    """torch's profiler imports torch's compiler, which takes seconds and no small part of memory, only to ask
    whether it makes CUDA graphs. A program that has not imported it makes none."""
    import torch

    on_demand: set[str] = getattr(torch, "_lazy_modules", set())
    hidden = {"_inductor"} & on_demand if "torch._inductor" not in sys.modules else set()
    on_demand -= hidden
    try:
        yield
    finally:
        on_demand |= hidden


class TorchRecorder:
    """torch.profiler with shapes and memory, on the CPU and the devices that torch knows; with what
    ``bench/profile/process.py`` counts beside it.

    steps: with a number, torch's schedule marks them: after one that warms the profiler up, ``steps`` are
    recorded as ProfilerStep#1 and so on. Without, the program's own marks are what there is.
    memory: also record what is allocated. Together with shapes it keeps torch from using freed memory again:
    page faults counted meanwhile are the profiler's (measured: 16,000 instead of 0 a step).
    counted: of the process, beforehand, where page faults matter; by default it is counted meanwhile, with a
    series of samples of which a reader takes those of the program's steps.
    """

    suffix = ".json.gz"

    def __init__(self, steps: int = 0, memory: bool = True, counted: dict[str, Any] | None = None) -> None:
        self.steps_marked = steps > 0
        self._steps, self._memory, self._beforehand = steps, memory, counted
        self._profile: Any = None
        self._early: Path | None = None  # the report, when the program began to profile by itself
        self._ranks_known = False
        self._process = _process()
        self._counted: Any = None
        self._done = 0
        self._replaced: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        from torch import profiler

        self._counted = self._process.ProcessRecord()
        self._profile = profiler.profile(
            activities=profiler.supported_activities(),
            schedule=profiler.schedule(wait=0, warmup=1, active=self._steps, repeat=1)
            if self._steps
            else None,
            record_shapes=True,
            profile_memory=self._memory,
            # No with_flops: to count them torch holds the inputs of all operators until the end, and memory
            # is not used again. The reader counts them from the shapes.
        )
        with _compiler_left_alone():
            self._profile.start()
        self._ranks_known = "backend" in _ranks()
        self._yield_to_the_program()
        self._counted.start()

    def _yield_to_the_program(self) -> None:
        """torch has one profiler at a time: where the program starts its own, ours ends just before."""
        from torch import autograd, profiler

        def first_end_ours(method: Callable[..., Any]) -> Callable[..., Any]:
            def begin(theirs: Any) -> Any:
                if self._profile is not None and self._early is None:
                    self._early = Path(tempfile.mkdtemp(prefix="perflab-profile-")) / "report.json.gz"
                    self._end(self._early)
                    print(
                        "perflab: the program starts torch.profiler by itself: perflab's record ends there",
                        file=sys.stderr,
                    )
                return method(theirs)

            return begin

        # The methods of torch's classes, so that "from torch.profiler import profile" is met too.
        for owner, name in ((profiler.profile, "start"), (autograd.profiler.profile, "__enter__")):
            self._replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, first_end_ours(getattr(owner, name)))

    def step(self) -> None:
        if not self.steps_marked:
            return
        if self._done == self._steps:  # torch closes the report with the last step, before ``stop``
            self._add_process()
        self._profile.step()
        if self._done == 0:  # the schedule drops the first
            self._counted.restart()
        self._done += 1

    def stop(self, path: Path) -> bool:
        if self._profile is None:
            return False
        part = part_of(path)
        try:
            if self._early is not None:
                import shutil

                shutil.move(self._early, part)
                self._early.parent.rmdir()
            else:
                self._end(part)
            os.replace(part, path)
        finally:
            while self._replaced:
                owner, name, method = self._replaced.pop()
                setattr(owner, name, method)
        return True

    def _end(self, path: Path) -> None:
        self._add_process()
        ranks = _ranks()
        if ranks and not self._ranks_known:  # torch writes what it knows when the profiler starts
            self._profile.add_metadata_json("distributedInfo", json.dumps(ranks))
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))

    def _add_process(self) -> None:
        if self._counted is not None:
            counted = self._counted.stop()
            if self._beforehand is not None:
                counted |= self._beforehand
                for key in ("start_ns", "columns", "series"):  # of other steps than those that were counted
                    counted.pop(key, None)
            self._profile.add_metadata_json(self._process.KEY, json.dumps(counted))
            self._counted = None


def _ranks() -> dict[str, Any]:
    """What the report should know of the job: torch.distributed's word, or the launcher's."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        backend, rank = distributed.get_backend(), distributed.get_rank()
        return {"backend": backend, "rank": rank, "world_size": distributed.get_world_size()}
    known = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return {"rank": int(known[0]), "world_size": int(known[1])} if all(map(str.isdigit, known)) else {}


class JaxRecorder:
    """jax.profiler. It starts when the program traces its first function: starting it sets up JAX's backends,
    and until then a program may still choose them (``jax.config``, ``jax.distributed.initialize``)."""

    suffix = ".xplane.pb"

    def __init__(self, steps: int = 0) -> None:
        self.steps_marked = steps > 0
        self._folder: str | None = None
        self._count = 0
        self._annotation: Any = None

    def start(self) -> None:
        import jax.monitoring

        if self.steps_marked:  # a variant, warm already
            self._begin()
            self._mark()
        else:
            jax.monitoring.register_event_duration_secs_listener(lambda *event, **facts: self._begin())

    def _begin(self) -> None:
        if self._folder is not None:
            return
        import jax.profiler

        self._folder = tempfile.mkdtemp(prefix="perflab-profile-")
        try:
            jax.profiler.start_trace(self._folder)
        except RuntimeError as error:  # the program profiles itself
            os.rmdir(self._folder)
            self._folder = ""
            print(f"perflab: jax.profiler cannot start: {' '.join(str(error).split())}", file=sys.stderr)

    def _mark(self) -> None:
        import jax.profiler

        self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=self._count)
        self._annotation.__enter__()

    def step(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._count += 1
            self._mark()

    def stop(self, path: Path) -> bool:
        if not self._folder:
            return False
        import shutil

        import jax.profiler

        try:
            jax.profiler.stop_trace()
            written = sorted(Path(self._folder).rglob("*.xplane.pb"))
            if not written:
                return False
            shutil.move(written[0], part_of(path))
            os.replace(part_of(path), path)
            return True
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


class FunctionRecorder:
    """cProfile: the calls and seconds of every Python function (of the main thread)."""

    suffix = ".prof"
    steps_marked = False

    def __init__(self, steps: int = 0) -> None:
        import cProfile

        self._profile = cProfile.Profile()

    def start(self) -> None:
        self._profile.enable()

    def step(self) -> None:
        return

    def pause(self) -> None:
        self._profile.disable()

    def stop(self, path: Path) -> bool:
        self._profile.disable()
        self._profile.dump_stats(part_of(path))
        os.replace(part_of(path), path)
        return True


RECORDERS: dict[str, type[TorchRecorder] | type[JaxRecorder] | type[FunctionRecorder]] = {
    "torch": TorchRecorder,
    "jax": JaxRecorder,
    "cprofile": FunctionRecorder,
}
