"""Checkpoints that are written while the training goes on.

    saver = BackgroundSaver()
    for step in ...:
        ...
        saver.save(directory, step, state)     # returns when the tensors are copied
    saver.wait()

What ranks have to agree on and the copy of this rank's tensors (which costs their memory once more) are done
at once, in ``save``; a thread writes, and rank 0 renames when all files have reached the disk, as
`parallel.checkpoint` does: a kill at whatever moment leaves the checkpoint before untouched.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.checkpoint import prepare


class BackgroundSaver:
    """Saves one checkpoint at a time, by collectives of a group of its own; made by all ranks alike.

    The group is gloo's, whatever carries the training: its messages are some bytes of metadata, from the CPU.
    """

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None
        self._thread = ThreadPoolExecutor(1, "perflab-checkpoint")
        self._under_way: Future[Path] | None = None

    def save(
        self, directory: str | os.PathLike, step: int, state: dict[str, Any], keep: int = 2
    ) -> Future[Path]:
        """Copy ``state`` and write it meanwhile, when the save before has ended; the future holds the path.

        Raises what ``checkpoint.save`` does: what is wrong with this state at once, what went wrong in
        writing, from the future, from ``wait`` and from the next ``save``.
        """
        self.wait()
        write = prepare(directory, step, state, self.group, keep, copied=True)
        self._under_way = self._thread.submit(write)
        return self._under_way

    def wait(self) -> Path | None:
        """Until the save under way, if there is one, has reached the disk; where it is then."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way is not None else None

    def close(self) -> None:
        """The end of the thread, and the last save's."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
