"""From the words of a program to the words that run it under a profiler: only its script's place changes.

``python script.py ARGS``      ->  ``python child.py SETTINGS -- script.py ARGS``
``torchrun OPTIONS script.py`` ->  ``python -m torch.distributed.run OPTIONS child.py SETTINGS -- script.py``
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CHILD = str(Path(__file__).with_name("child.py"))
TORCHRUN = "torch.distributed.run"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD}
_TAKES_A_VALUE = ("--check-hash-based-pycs",)


@dataclass(frozen=True)
class Program:
    """A Python program in words. launcher: what comes before it, the interpreter and torchrun's options;
    words: the script, -m module or -c code, and its arguments, as each rank runs it."""

    launcher: list[str]
    words: list[str]

    @property
    def name(self) -> str:
        """train of ``python train.py`` and of ``torchrun -m train``."""
        if self.words[0] == "-c":
            return "code"
        return self.words[1] if self.words[0] == "-m" else Path(self.words[0]).stem

    def profiled(self, settings: str) -> list[str]:
        """The command that runs it under a profiler; ``settings``: JSON for ``bench/profile/child.py``."""
        return [*self.launcher, CHILD, settings, "--", *self.words]


def parse(words: Sequence[str]) -> Program:
    """ValueError: the words are no Python program, or nothing that could be run."""
    interpreter, program = _python_program(words)
    if program[0] == "-m" and program[1] == TORCHRUN:
        options, rank = _split_torchrun(program[2:])
        return Program([*interpreter, "-m", TORCHRUN, *options], rank)
    if program[0] == "-m" and program[1] == "torch.distributed.launch":
        raise ValueError("python -m torch.distributed.launch is deprecated: use torchrun, its successor")
    return Program(interpreter, program)


def _python_program(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the interpreter and its options, the program: a script, -m module or -c code, and its arguments)."""
    found = shutil.which(words[0]) or _beside_us(words[0])
    if found is None:
        hint = f"; perflab profile -- python {words[0]}" if Path(words[0]).is_file() else ""
        raise ValueError(f"there is no command {words[0]!r}{hint}")
    if re.fullmatch(r"python(\d(\.\d+)?t?)?", Path(words[0]).name):
        count = _interpreter_options(words)
        python = words[0] if shutil.which(words[0]) else found
        return [python, *words[1:count]], list(words[count:])
    interpreter = _interpreter_of(found)
    if not interpreter:
        raise ValueError(
            f"{words[0]} is no Python program, and only those can be profiled: "
            "perflab profile -- python script.py ARGS, or torchrun ... script.py ARGS"
        )
    if Path(found).name == "torchrun":
        return interpreter, ["-m", TORCHRUN, *words[1:]]
    return interpreter, [found, *words[1:]]


def _beside_us(command: str) -> str | None:
    """The command of the environment that perflab was called from by its path, which is not on PATH."""
    return shutil.which(command, path=os.path.dirname(sys.executable))


def _interpreter_options(words: Sequence[str]) -> int:
    """How many words belong to the interpreter: up to the script, -m or -c (also joined, as in -Bm)."""
    index = 1
    while index < len(words):
        word = words[index]
        if word in ("-m", "-c"):
            if index + 1 == len(words):
                raise ValueError(f"{shlex.join(words)}: {word} names nothing to run")
            return index
        if word == "-" or not word.startswith("-"):
            break
        if not word.startswith("--") and word[1:2] not in ("X", "W") and re.search("[mc]", word):
            raise ValueError(f"{word}: give -m or -c as a word of its own")
        index += 2 if word in ("-X", "-W", *_TAKES_A_VALUE) else 1
    if index >= len(words) or words[index] == "-":
        raise ValueError(
            f"{shlex.join(words)} names no program to profile: python script.py, -m module or -c code"
        )
    return index


def _interpreter_of(path: str) -> list[str]:
    """The words of a script's first line, when they start Python; else nothing."""
    with open(path, "rb") as file:
        line = file.readline(512)
    if not line.startswith(b"#!"):
        return []
    words = line[2:].decode(errors="replace").split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if word != "-S"]
    return words if words and Path(words[0]).name.startswith("python") else []


def _split_torchrun(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(torchrun's options, what each rank runs), by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed = get_args_parser().parse_args(list(words))
    except SystemExit:
        last = said.getvalue().strip().splitlines()[-1:]
        raise ValueError(f"torchrun refuses this: {''.join(last)}") from None
    if parsed.no_python:
        raise ValueError(
            "torchrun --no-python runs anything; name a Python script instead, without that option"
        )
    options = list(words[: len(words) - 1 - len(parsed.training_script_args)])
    rank = [parsed.training_script, *parsed.training_script_args]
    if parsed.module:
        options = [word for word in options if word not in ("-m", "--module")]
        rank.insert(0, "-m")
    return [word for word in options if word not in ("--run-path", "--run_path")], rank


@contextlib.contextmanager
def signals_held() -> Iterator[set[int]]:
    """Signals stay pending for ``run`` to deal with, also on threads that libraries start meanwhile (else one
    of them gets Ctrl-C). Yields what was held before, which the program gets."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield {int(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(command: Sequence[str], held_before: set[int], output: int | None = None) -> int:
    """Run it in the foreground; its exit status, or 128 + the number of the signal that ended it. Only inside
    ``signals_held``.

    Its input and output are ours; what it prints goes to the file ``output`` where one is given. Signals sent
    to us are passed on, but for those that the terminal already sent to the whole group (Ctrl-C): twice would
    interrupt the program's own cleaning up.
    """
    if signal.sigpending() & {signal.SIGINT, signal.SIGTERM}:
        raise KeyboardInterrupt  # it came before the program was there
    restored = partial(signal.pthread_sigmask, signal.SIG_SETMASK, held_before)
    child = subprocess.Popen(command, preexec_fn=restored, stdout=output)
    while child.poll() is None:
        arrived = signal.sigtimedwait(_SIGNALS, 1.0)
        if arrived is None or arrived.si_signo == signal.SIGCHLD:
            continue
        if arrived.si_code <= 0:  # sent by a process; above 0 by the kernel, for the terminal
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, arrived.si_signo)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
