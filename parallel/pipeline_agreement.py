"""Where all ranks of a pipeline meet: each gives some numbers, and whether something has gone wrong.

Every rank sends to every other one directly, so that the last one to come holds up the others by no more than
a message's latency, where a ring would add p - 1 of them. Who has work meanwhile can wait later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.liveness import RankLost
from parallel.pipeline_messages import OtherFailed, RankUnreachable
from parallel.together import raise_alike, said_by

NOTE = "perflab/pipeline/lost"
TAG = (1 << 19) + 2
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
        self._rank, size = groups[0].rank(), groups[0].size()
        own = torch.tensor([error is not None, *numbers], dtype=torch.float64, device=device)
        self._rows = own.repeat(size, 1)
        self._works: list[tuple[int, Any]] = []
        if isinstance(error, RankUnreachable):
            return
        with self._in_vain():
            for other in [one for one in range(size) if one != self._rank]:
                sending, receiving = groups[self._rank > other], groups[other > self._rank]
                self._works.append((other, receiving.recv([self._rows[other]], other, TAG)))
                self._works.append((other, sending.send([own], other, TAG)))

    def wait(self) -> list[list[float]]:
        """If any rank has an error, all raise what was said, the same. A rank that has lost another one
        raises alone: the others can only find out by themselves."""
        error, group = self._error, self._groups[0]
        if isinstance(error, RankUnreachable):
            raise _with_note(error)
        for other, work in self._works:
            with self._in_vain(other):
                work.wait()
        rows = self._rows.tolist()
        if any(row[0] for row in rows):
            mine = None if error is None or isinstance(error, OtherFailed) else said_by(error)
            said: list[Any] = [mine] * group.size()
            if group.size() > 1:
                with self._in_vain():
                    dist.all_gather_object(said, mine, group=group)
            raise_alike({rank: text for rank, text in enumerate(said) if text is not None}, error)
        return [row[1:] for row in rows]

    @contextlib.contextmanager
    def _in_vain(self, other: int | None = None) -> Any:
        try:
            yield
        except RankLost:
            raise
        except RuntimeError as raised:
            whom = "the others" if other is None else f"rank {other}"
            text = f"rank {self._rank} of {self._groups[0].size()} waited in vain for {whom} at {self._what}"
            raise _with_note(RankUnreachable(f"{text}: {str(raised).splitlines()[0]}")) from raised


def agree(
    groups: Groups, error: Exception | None, numbers: Sequence[float], what: str, device: torch.device
) -> list[list[float]]:
    """A meeting that is waited for at once."""
    return Meeting(groups, error, numbers, what, device).wait()


def _with_note(error: RankUnreachable) -> RankUnreachable:
    """Who first lost a rank leaves a note in the store, so that those who lose that one in turn can say whom
    they really lack."""
    with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set(NOTE, "", str(error)).decode()
        if first and first != str(error):
            return RankUnreachable(f"{error}; before that, {first}")
    return error


def directions(group: dist.ProcessGroup, device: torch.device) -> Groups:
    """``group``, twice. NCCL has one queue between two ranks for both ways, in which a receive posted ahead
    would stand before a send that it depends on: there, two groups."""
    if device.type != "cuda" or group.size() == 1:
        return group, group
    ranks = dist.get_process_group_ranks(group)
    return group, dist.new_group(ranks, use_local_synchronization=True)
