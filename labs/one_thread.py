"""torch on one thread: small work is done before a second one has woken up."""

from __future__ import annotations

from labs.lab import Step

_alive = 0
_before = 1


class OneThread:
    """A step that runs with one of torch's threads: from the first of such steps that is made until the last
    one is closed. The others of its group run so too; setting it at each call would cost microseconds."""

    def __init__(self, step: Step) -> None:
        global _alive, _before
        import torch

        self._step = step
        if not _alive:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _alive += 1

    def __call__(self) -> object:
        return self._step()

    def close(self) -> None:
        global _alive
        import torch

        _alive -= 1
        if not _alive:
            torch.set_num_threads(_before)
