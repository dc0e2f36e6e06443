"""Where all ranks of a pipeline meet: each gives some numbers, and whether something has gone wrong.

Every rank sends to every other one directly, so that the last one to come holds up the others by no more than
a message's latency, where a ring would add p - 1 of them; and so that those who are left hear of each other
when one has died. Who has work meanwhile can wait later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.liveness import RankLost
from parallel.pipeline_messages import OtherFailed, RankUnreachable
from parallel.together import raise_alike, said_by

TAG, TEXT_TAG = (1 << 19) + 2, (1 << 19) + 3
TEXT_BYTES = 1024
KINDS: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError, RankUnreachable)
Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]
"""For messages to a higher and to a lower rank."""


class Meeting:
    """Under way from when it is made; ``wait`` gives every rank's ``numbers``, as many on each (float64).

    error: of this rank. what: for messages, where the ranks meet.
    """

    def __init__(
        self,
        groups: Groups,
        error: Exception | None,
        numbers: Sequence[float],
        what: str,
        device: torch.device,
    ) -> None:
        self._groups, self._error, self._what = groups, error, what
        self._rank, self._size = groups[0].rank(), groups[0].size()
        self._lost: dict[int, RankUnreachable] = {}
        own = torch.tensor([error is not None, *numbers], dtype=torch.float64, device=device)
        self._rows, self._works = self._exchange(own, TAG)

    def wait(self) -> list[list[float]]:
        """If any rank has an error, all that are left raise what was said, the same."""
        self._finish(self._works)
        rows = self._rows.tolist()
        if any(row[0] for row in rows):
            said = self._texts()
            lost = {rank: text for rank, (kind, text) in said.items() if kind is RankUnreachable}
            if lost:
                raise RankUnreachable("; ".join(dict.fromkeys(lost.values()))) from self._error
            raise_alike(said, self._error)
        for unreachable in self._lost.values():
            raise unreachable
        return [row[1:] for row in rows]

    def _exchange(self, own: torch.Tensor, tag: int) -> tuple[torch.Tensor, list[tuple[int, Any]]]:
        """(what each rank has, zeros of those that are lost; the messages under way)."""
        rows, works = own.new_zeros(self._size, len(own)), []
        rows[self._rank] = own
        for other in range(self._size):
            if other == self._rank or other in self._lost:
                continue
            sending, receiving = self._groups[self._rank > other], self._groups[other > self._rank]
            try:
                works.append((other, receiving.recv([rows[other]], other, tag)))
                works.append((other, sending.send([own], other, tag)))
            except RankLost:
                raise
            except RuntimeError as error:
                self._lose(other, error)
        return rows, works

    def _finish(self, works: list[tuple[int, Any]]) -> None:
        for other, work in works:
            try:
                if other not in self._lost:
                    work.wait()
            except RankLost:
                raise
            except RuntimeError as error:
                self._lose(other, error)

    def _lose(self, other: int, error: RuntimeError) -> None:
        self._lost[other] = RankUnreachable(
            f"rank {self._rank} of {self._size} waited in vain for rank {other} at {self._what}: "
            f"{str(error).splitlines()[0]}"
        )

    def _texts(self) -> dict[int, tuple[type[Exception], str]]:
        """What is said by each rank that has something to say."""
        own = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        error = self._error
        if error is not None and not isinstance(error, OtherFailed):
            unreachable = isinstance(error, RankUnreachable)
            kind, text = (RankUnreachable, str(error)) if unreachable else said_by(error)
            packed = list(text.encode())[: TEXT_BYTES - 1]
            own[: 1 + len(packed)] = torch.tensor([1 + KINDS.index(kind), *packed], dtype=torch.uint8)
        rows, works = self._exchange(own.to(self._rows.device), TEXT_TAG)
        self._finish(works)
        said = {}
        for rank, row in enumerate(rows.cpu()):
            if row[0]:
                text = bytes(row[1:].tolist()).rstrip(b"\0").decode(errors="replace")
                said[rank] = KINDS[int(row[0]) - 1], text
        return said


def agree(
    groups: Groups, error: Exception | None, numbers: Sequence[float], what: str, device: torch.device
) -> list[list[float]]:
    """A meeting that is waited for at once."""
    return Meeting(groups, error, numbers, what, device).wait()


def directions(group: dist.ProcessGroup, device: torch.device) -> Groups:
    """``group``, twice. NCCL has one queue between two ranks for both ways, in which a receive posted ahead
    would stand before a send that it depends on: there, two groups."""
    if device.type != "cuda" or group.size() == 1:
        return group, group
    ranks = dist.get_process_group_ranks(group)
    return group, dist.new_group(ranks, use_local_synchronization=True)
