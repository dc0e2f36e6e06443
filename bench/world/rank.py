"""A rank of a world: answers the controller's commands (``python -m bench.world.rank``, by the launcher)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.measure import RoundRecorder, explain
from bench.world import protocol


class _Rank:
    """What one rank knows: the steps that were set up, and what they record."""

    def __init__(self) -> None:
        self._steps: dict[str, Callable[[], object]] = {}
        self._recorders: dict[str, RoundRecorder] = {}

    def set_up(self, lab: str, settings: dict[str, Any], address: str) -> dict[str, Any]:
        from labs import load
        from labs.lab import find

        recorder = self._recorders[address] = RoundRecorder()
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


def _imported(address: str) -> Callable[[], Callable[[], object]]:
    """The function at ``package.module:function``; modules of the current folder count."""
    from importlib import import_module

    module, _, function = address.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(import_module(module), function)


def serve(store: Any) -> None:
    """Answer commands until ``stop``, until the store is gone, or after an hour without a command.

    torch.distributed must be initialised; ``store`` is a client of the controller's, or its own.
    """
    import torch.distributed as dist

    rank, me, number = dist.get_rank(), _Rank(), 0
    while True:
        number += 1
        operation, content = protocol.received(store, number)
        try:
            answer = getattr(me, operation)(**content)
        except Exception as error:
            answer = {"error": explain(error)}
        try:
            protocol.answer(store, number, rank, answer)
        except Exception as error:  # pickle's are of many types; a store that is gone raises again
            said = f"the output of {operation!r} cannot be sent: {explain(error)}"
            protocol.answer(store, number, rank, {"error": said})
        if operation == "stop":
            return


def main() -> None:
    import torch.distributed as dist

    host, port, _ = protocol.parse(protocol.joined_address())
    dist.init_process_group("gloo", timeout=timedelta(seconds=protocol.COLLECTIVE_SECONDS))
    with contextlib.suppress(dist.DistNetworkError):  # the controller is gone: so are we
        serve(protocol.connect(host, port))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
