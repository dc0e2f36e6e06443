"""Where all ranks of a pipeline meet: each gives some numbers, and whether something has gone wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.liveness import RankLost
from parallel.pipeline_messages import OtherFailed, RankUnreachable
from parallel.tensor_regions import all_gather
from parallel.together import raise_alike, said_by

NOTE = "perflab/pipeline/lost"


def agree(
    group: dist.ProcessGroup,
    error: Exception | None,
    numbers: Sequence[float],
    what: str,
    device: torch.device,
) -> list[list[float]]:
    """Every rank's ``numbers``, as many on each (float64). what: for messages, where the ranks meet.

    If any rank has an ``error``, all raise what was said, the same. A rank that has lost another one raises
    alone: the others can only find out by themselves.
    """
    if isinstance(error, RankUnreachable):
        raise _with_note(error)
    if group.size() == 1:
        if error is not None:
            raise error
        return [list(numbers)]
    own = torch.tensor([error is not None, *numbers], dtype=torch.float64, device=device)
    gathered = own.new_empty(group.size() * len(own))
    said: list[Any] = [None] * group.size()
    try:
        all_gather(gathered, own, group=group)
        rows = gathered.view(group.size(), -1).tolist()
        if any(row[0] for row in rows):
            mine = None if error is None or isinstance(error, OtherFailed) else said_by(error)
            dist.all_gather_object(said, mine, group=group)
    except RankLost:
        raise
    except RuntimeError as raised:
        text = f"rank {group.rank()} of {group.size()} waited in vain for the others at {what}"
        raise _with_note(RankUnreachable(f"{text}: {str(raised).splitlines()[0]}")) from error or raised
    raise_alike({rank: text for rank, text in enumerate(said) if text is not None}, error)
    return [row[1:] for row in rows]


def _with_note(error: RankUnreachable) -> RankUnreachable:
    """Who first lost a rank leaves a note in the store, so that those who lose that one in turn can say whom
    they really lack."""
    with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set(NOTE, "", str(error)).decode()
        if first and first != str(error):
            return RankUnreachable(f"{error}; before that, {first}")
    return error
