"""What every collective here is made of: rounds of messages, and one runner for them.

An algorithm is a generator. Each round it yields the messages that this rank sends and receives at the same
time, and goes on when all have arrived; it knows ranks and chunks, no process group. ``start`` runs one over
a group: all receives and sends of a round are posted before any is waited for, so that no order of calls can
deadlock, and each call has a tag of its own, so that several can be in flight.

``agree`` tells every rank some integers of all, before anything else is sent: whether all were called with
the same arguments, for one. It costs ceil(log2 p) small messages.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.traffic import background, blocked


class Send(NamedTuple):
    """``tensor`` (contiguous) goes to ``peer``, a rank of the group."""

    peer: int
    tensor: torch.Tensor


class Receive(NamedTuple):
    """``tensor`` (contiguous) is overwritten with what ``peer`` sends."""

    peer: int
    tensor: torch.Tensor


Message = Send | Receive
Rounds = Generator[list[Message], None, None]

FIRST_TAG, TAGS = 1 << 20, 1 << 20  # below are the user's own
_numbers: "weakref.WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]]" = weakref.WeakKeyDictionary()
_runners: "weakref.WeakKeyDictionary[dist.ProcessGroup, ThreadPoolExecutor]" = weakref.WeakKeyDictionary()
_streams: dict[torch.device, Any] = {}
_lock = threading.Lock()


class Handle:
    """A collective in flight. Its tensors belong to it until ``wait()`` has returned."""

    def __init__(self, future: "Future[None] | None", event: Any = None, device: Any = None) -> None:
        self._future, self._event, self._device = future, event, device

    def wait(self) -> None:
        """Return when the result is there (CUDA: when the current stream will wait for it), or raise what
        went wrong."""
        with blocked():
            if self._future is not None:
                self._future.result()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_completed(self) -> bool:
        """Whether ``wait()`` would return at once."""
        return self._event.query() if self._future is None else self._future.done()


def start(
    rounds: Callable[[], Rounds], group: dist.ProcessGroup, what: str, device: torch.device, async_op: bool
) -> Handle | None:
    """Run an algorithm; with ``async_op`` return at once, and its handle.

    Calls on one group run one after another in a thread of the group, in the order of the calls: all ranks
    must call in the same order, as torch.distributed asks, too. On a CUDA device nothing blocks and a stream
    takes its place.
    """
    tag = _next_tag(group)
    if not async_op:
        _run(rounds(), group, tag, what)
        return None
    if device.type == "cuda":
        with _lock:
            stream = _streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _run(rounds(), group, tag, what)
            return Handle(None, stream.record_event(), device)
    with _lock:
        if group not in _runners:
            _runners[group] = ThreadPoolExecutor(1, thread_name_prefix="parallel.collectives")

        def run() -> None:
            with background():
                _run(rounds(), group, tag, what)

        return Handle(_runners[group].submit(run))


def _next_tag(group: dist.ProcessGroup) -> int:
    """The number of this call on its group: the same on all ranks, and unlike that of any other in flight."""
    with _lock:
        return FIRST_TAG + next(_numbers.setdefault(group, itertools.count())) % TAGS


@torch.no_grad()
def _run(rounds: Rounds, group: dist.ProcessGroup, tag: int, what: str) -> None:
    for messages in rounds:
        messages = [message for message in messages if message.tensor.numel()]
        if not messages:
            continue
        operations = [
            dist.P2POp(
                dist.isend if isinstance(message, Send) else dist.irecv,
                message.tensor,
                group=group,
                tag=tag,
                group_peer=message.peer,
            )
            for message in sorted(messages, key=lambda message: isinstance(message, Send))  # receives first
        ]
        works = dist.batch_isend_irecv(operations)
        for number, work in enumerate(works):
            try:
                work.wait()
            except RuntimeError as error:
                peers = [operations[number].group_peer] if len(works) == len(operations) else []
                raise RuntimeError(_who(group, what, operations, peers) + f": {error}") from error


def _who(group: dist.ProcessGroup, what: str, operations: Sequence[Any], peers: list[int]) -> str:
    names = ", ".join(str(peer) for peer in peers or sorted({op.group_peer for op in operations}))
    return f"{what}: rank {group.rank()} of {group.size()} waited in vain for rank {names}"


def bruck_all_gather(blocks: torch.Tensor, rank: int) -> Rounds:
    """blocks[0] of every rank to all; in the end blocks[i] is that of rank (rank + i) mod p.

    blocks: (p, ...), contiguous. The known part doubles each round: ceil(log2 p) a + (p-1)/p n b for any p.
    Bruck and others (1997); Thakur 4.1.
    """
    size, known = len(blocks), 1
    while known < size:
        count = min(known, size - known)
        yield [
            Send((rank - known) % size, blocks[:count]),
            Receive((rank + known) % size, blocks[known : known + count]),
        ]
        known += count


def agree(
    facts: Sequence[int], rank: int, size: int, device: torch.device
) -> Generator[list[Message], None, list[list[int]]]:
    """``facts``, as many integers on every rank, of all ranks in their order."""
    mine = torch.tensor(facts, dtype=torch.int64, device=device)
    blocks = mine.new_empty(size, len(mine))
    blocks[0] = mine
    yield from bruck_all_gather(blocks, rank)
    return blocks.roll(rank, 0).tolist()
