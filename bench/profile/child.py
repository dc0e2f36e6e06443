"""Run a Python program under a profiler, as the interpreter itself would run it.

``python child.py SETTINGS -- script.py ARGS`` (or ``-m module ARGS``, ``-c code ARGS``); SETTINGS is JSON:
``{"output": folder, "kind": "torch" | "jax" | "cprofile" | "", "memory": bool}``. torchrun starts it once for
each rank.

The program sees what it would see: its ``__main__``, ``sys.argv``, ``sys.path[0]``, its exit status, its
tracebacks, Ctrl-C. What is recorded ends in an ``atexit`` function, so it holds the program's threads and is
written also when the program fails. Only ``os._exit`` and SIGKILL leave no report; SIGTERM does.

Without a kind, what the program imports decides: torch.profiler from the first ``import torch`` on,
jax.profiler when JAX was first, and cProfile for a program that imports neither (and until then). Nothing is
imported on the program's behalf: it may set variables that torch and JAX read when they are imported.

Runs by its path in the program's interpreter, which may have no perflab: imports the standard library alone.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import runpy
import signal
import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("torch", "jax")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``found(name)`` when one of the names has been imported, once for each."""

    def __init__(self, names: Sequence[str], found: Callable[[str], None]) -> None:
        self._names, self._found = set(names), found

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._names:
            return None
        self._names.discard(name)
        spec = importlib.util.find_spec(name)  # asks the other finders, and us: not again
        execute = getattr(spec.loader, "exec_module", None) if spec is not None else None
        if spec is None or execute is None:
            return None

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._found(name)

        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        return spec


class Recording:
    """The one profiler that runs: the kind that was asked for, or that of what the program imports first."""

    def __init__(self, recorders: Any, kind: str, folder: Path, memory: bool) -> None:
        self._recorders, self._kind, self._folder, self._memory = recorders, kind, folder, memory
        self._process, self._stopped = os.getpid(), False
        self.recorder: Any = None

    def begin(self) -> None:
        """Just before the program's first line."""
        atexit.register(self.stop)
        wanted = LIBRARIES if not self._kind else (self._kind,)
        if self._kind != "cprofile":
            sys.meta_path.insert(0, AfterImport(wanted, self._imported))
        if self._kind in ("", "cprofile"):
            self._start("cprofile")
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)

    def _imported(self, library: str) -> None:
        if self._stopped or os.getpid() != self._process:
            return
        if isinstance(self.recorder, self._recorders.FunctionRecorder):
            self.recorder.pause()
        elif self.recorder is not None:
            return  # the other library was first
        self._start(library)

    def _start(self, kind: str) -> None:
        made = self._recorders.RECORDERS[kind]
        self.recorder = made(memory=self._memory) if kind == "torch" else made()
        self.recorder.start()
        # After the library's own atexit functions, so that ours runs before them.
        atexit.unregister(self.stop)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Write the report, once, and not in a process that the program forked."""
        if self._stopped or os.getpid() != self._process:
            return
        self._stopped = True
        try:
            if self.recorder is None:
                _say(f"no report: the program did not import {self._kind}")
            elif not self.recorder.stop(self._folder / f"{report_name()}{self.recorder.suffix}"):
                _say("no report: the program computed nothing with JAX")
        except Exception as error:  # whatever it is, the program's own end is not changed by it
            _say(f"no report: {type(error).__name__}: {' '.join(str(error).split())}")

    def _terminated(self, number: int, frame: Any) -> NoReturn:
        self.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(128 + number)  # not reached


def report_name() -> str:
    """rank3 under a launcher, else profile; restart1-rank3 where torchrun started the ranks again."""
    if "RANK" not in os.environ:
        return "profile"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return ("" if restarts == "0" else f"restart{restarts}-") + f"rank{os.environ['RANK']}"


def _say(text: str) -> None:
    print(f"perflab: {text}", file=sys.stderr)


def program(words: Sequence[str]) -> Callable[[], object]:
    """What runs the program in a fresh ``__main__``, once ``sys`` is as the interpreter would have it."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    first, rest = words[0], list(words[1:])
    safe = getattr(sys.flags, "safe_path", False)
    if first == "-m":
        sys.argv[:] = ["-m", *rest[1:]]
        if not safe:
            sys.path.insert(0, os.getcwd())
        return lambda: runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined] # what python -m calls
    if first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        if not safe:
            sys.path.insert(0, "")
        code = compile(rest[0], "<string>", "exec")
        return lambda: exec(code, main.__dict__)
    sys.argv[:] = [first, *rest]
    if os.path.isdir(first) or (not first.endswith((".py", ".pyw")) and zipfile.is_zipfile(first)):
        sys.path.insert(0, first)
        return lambda: runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    if not safe:
        sys.path.insert(0, os.path.dirname(os.path.realpath(first)))
    path = os.path.join(os.getcwd(), first)
    code = compile(_source(first), path, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
    return lambda: exec(code, main.__dict__)


def _source(path: str) -> bytes:
    try:
        with io.open_code(os.path.abspath(path)) as file:
            return file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _silent(*error: object) -> None:
    return


def run(recording: Recording, words: Sequence[str]) -> None:
    """Run the program. What it raises is shown as Python shows it, without the frames of this file and of
    runpy, and raised again: the interpreter then ends with the status it would have ended with."""
    try:
        start = program(words)
        recording.begin()
        start()
    except SystemExit:
        raise
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename in (
            __file__,
            runpy.__file__,
            "<frozen runpy>",
        ):
            frames = frames.tb_next
        error.__traceback__ = frames
        sys.excepthook(type(error), error, frames)
        sys.excepthook = _silent
        raise


def main() -> None:
    settings, words = json.loads(sys.argv[1]), sys.argv[3:]
    # Not this file's folder but the program's comes first, and perflab's modules are not in its way.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    place = Path(__file__).with_name("recorders.py")
    spec = importlib.util.spec_from_file_location("_perflab_recorders", place)
    assert spec is not None
    assert spec.loader is not None
    recorders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorders)
    recording = Recording(recorders, settings["kind"], Path(settings["output"]), settings["memory"])
    run(recording, words)


if __name__ == "__main__":
    main()
