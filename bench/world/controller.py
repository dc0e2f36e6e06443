"""The controller's side of a world: commands to its ranks, their answers, and what is wrong with them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

from bench.world import protocol

POLL_SECONDS = 0.2  # how soon a rank's error, or the world's end, is seen while other ranks are waited for


class World:
    """A world of ``size`` ranks: those that torchrun started where it did, else new ones.

    ValueError: torchrun started another number. RuntimeError: the ranks did not start, or are broken.
    """

    def __init__(self, size: int, answer_seconds: float = protocol.ANSWER_SECONDS) -> None:
        self.size, self.answer_seconds = size, answer_seconds
        self.broken = ""  # why it is of no more use: a late answer may come, or a collective be out of step
        self.recorded: dict[str, dict[str, list[float]]] = {}  # address -> what rank 0 recorded last
        self.texts: dict[str, dict[str, str]] = {}  # address -> the texts that rank 0 kept
        self._agent: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self.joined = bool(protocol.joined_size())
        try:
            self._store = self._join() if self.joined else protocol.open_store()
            if not self.joined:
                self._launch()
            self._ask("hello", protocol.START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _join(self) -> Any:
        host, port, joined = protocol.parse(protocol.joined_address())
        if joined != self.size:
            raise ValueError(
                f"this variant runs on {self.size} ranks, but torchrun started {joined}; "
                f"use --nproc-per-node {self.size}"
            )
        store = protocol.connect(host, port)
        if store.check([protocol.BROKEN]):  # an earlier process that measured with these ranks says so
            self.broken = store.get(protocol.BROKEN).decode()
        return store

    def _launch(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["--rdzv-id", f"perflab-{os.getpid()}"]
        command += ["--nproc-per-node", str(self.size), "-m", "bench.world.rank"]
        environment = protocol.without_launcher(os.environ)
        environment[protocol.ADDRESS] = protocol.address_of(self._store.port, self.size)
        # As -P, for the ranks too: a bench.py of the user's folder is not taken for ours.
        environment["PYTHONSAFEPATH"] = "1"
        self._agent = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    def _ask(self, operation: str, seconds: float | None = None, **content: Any) -> list[dict[str, Any]]:
        """Send one command to every rank; all answers.

        RuntimeError: what ranks raised, or that the world is broken, at once. TimeoutError: who did not
        answer. Any error breaks the world but one that all ranks raised alike: where some went on and others
        did not, they may stand at different collectives, and the next one would hang.
        """
        from torch.distributed import DistNetworkError

        if self.broken:
            raise RuntimeError(f"the world of {self.size} ranks is of no more use since {self.broken}")
        what = f"{operation!r} {content.get('address', '')}".rstrip()
        try:
            number = protocol.send(self._store, operation, **content)
            answers = self._answers(number, what, self.answer_seconds if seconds is None else seconds)
        except BaseException as error:  # Ctrl-C too: the answers would come to the next command
            self._break(f"{what} ended with {type(error).__name__}: {error}")
            if isinstance(error, DistNetworkError):  # a store of our own lives as long as we do
                raise RuntimeError(f"the world that torchrun started ended during {what}: {error}") from None
            raise
        errors = {rank: answers[rank]["error"] for rank in sorted(answers) if "error" in answers[rank]}
        if not errors:
            return [answers[rank] for rank in range(self.size)]
        alike = len(errors) == self.size and len(set(errors.values())) == 1
        said = [f"rank {rank} of {self.size}: {error}" for rank, error in errors.items()]
        if silent := [rank for rank in range(self.size) if rank not in answers]:
            said.append(f"then no answer from {_ranks(silent)}")
        problem = said[0] if alike else "; ".join(said)
        if not alike:
            self._break(f"{what} failed: {problem}")
        raise RuntimeError(problem)

    def _answers(self, number: int, what: str, limit: float) -> dict[int, dict[str, Any]]:
        """By rank. Some are missing where a rank raised and others, which may wait for it, did not follow."""
        from torch.distributed import DistStoreError

        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + limit
        while True:
            waiting = [rank for rank in range(self.size) if rank not in answers]
            keys = {rank: protocol.answer_key(number, rank) for rank in waiting}
            left = max(0.01, min(POLL_SECONDS, deadline - time.monotonic()))
            with contextlib.suppress(DistStoreError):  # not all are there yet
                self._store.wait(list(keys.values()), timedelta(seconds=left))
            for rank in waiting:
                if self._store.check([keys[rank]]):
                    answers[rank] = protocol.answered(self._store, number, rank)
                    if "error" in answers[rank]:
                        deadline = min(deadline, time.monotonic() + protocol.GRACE_SECONDS)
            if len(answers) == self.size:
                self._store.delete_key(protocol.command_key(number))
                return answers
            failed = any("error" in answer for answer in answers.values())
            ended = self._agent is not None and self._agent.poll() is not None
            late = time.monotonic() >= deadline
            if failed and (ended or late):
                return answers
            if ended:
                raise RuntimeError(f"the world ended during {what}: {self._last_words()}")
            if late:
                silent = [rank for rank in waiting if rank not in answers]
                raise TimeoutError(
                    f"the controller waits for {_ranks(silent)} of {self.size} to answer {what}: "
                    f"nothing within {limit:.0f} s"
                )

    def _break(self, why: str) -> None:
        self.broken = why
        if self.joined:
            with contextlib.suppress(Exception):
                self._store.set(protocol.BROKEN, why)

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
        """End a step. A broken world's steps end with its ranks."""
        if not self.broken:
            self._ask("tear_down", address=address)

    def close(self) -> None:
        """End the ranks that were started here: asked to stop when they still answer, else ended."""
        if self._agent is not None:
            if not self.broken:
                with contextlib.suppress(Exception):
                    self._ask("stop", 5.0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._agent.wait(10.0)
            _end(self._agent)
        self._log.close()


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


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
