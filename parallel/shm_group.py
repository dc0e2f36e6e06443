"""The part of a process group over shared memory that all of its operations stand on, and its names."""

from __future__ import annotations

import math
import struct
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.autograd import profiler

from parallel.shm_agreement import ALL_GATHER, amounts, dtype_name, header_of, spelled
from parallel.shm_exchange import COMPARES, DIFFERENT, POSTS
from parallel.shm_progress import BRIEF, Lane, Operation, Progress, Steps
from parallel.shm_reduce import reduction
from parallel.shm_segment import Segment
from parallel.shm_tensors import in_order, place_of, put_back, room_for

TRIED_BYTES, TRIES = 1 << 18, 4
"""Of each rank, and how often either kind of copy is tried, when a group is made: a few milliseconds."""


class SharedGroup(dist.ProcessGroup):
    """Starting operations, exchanging, and agreeing. store: of this group. names: its ranks in the world."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, names: Sequence[int], name: str):
        super().__init__(rank, size)
        self._rank, self._size, self._group_name, self._group_desc = rank, size, name, "undefined"
        self._store = store
        seconds = timeout.total_seconds()
        self._segment = Segment(store, rank, names or range(size), seconds)
        self._progress = Progress(self._segment, seconds)
        self._run, self._lock = self._progress.run, self._progress.lock
        self._lane = self._progress.lane(self._segment.collectives(), range(size), rank)
        self._channels: dict[tuple[int, int], Lane] = {}
        self._unexpected: dict[int, dict[int, deque[Any]]] = defaultdict(lambda: defaultdict(deque))
        self._sums: dict[torch.dtype, tuple[int, int, int]] = {}
        self._together: list[Operation] | None = None  # what a coalescing manager has collected
        if size > 1:
            self._choose_copies()

    # --- what torch asks of a group --------------------------------------------------------------

    def getBackendName(self) -> str:
        return "shm"

    def name(self) -> str:
        return "shm"

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def get_group_store(self) -> Any:
        return self._store

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def pg_name(self) -> str:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, description: str) -> None:
        self._group_desc = description

    def getGroupName(self) -> str:
        return self._group_name

    def setGroupName(self, name: str) -> None:
        self._group_name = name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def setGroupDesc(self, description: str) -> None:
        self._group_desc = description

    @property
    def streams(self) -> bool:
        """Whether large chunks are written past the caches, as this group's ranks found faster."""
        return self._progress.streams

    def set_timeout(self, timeout: timedelta) -> None:
        self._progress.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Leave the group; ranks that wait for this one get an error at once."""
        self._segment.leave()

    def abort(self) -> None:
        """End what is under way with an error, here and on the other ranks."""
        self._progress.break_off("it was aborted", self._rank)

    # --- setting up ----------------------------------------------------------------------------------

    def _choose_copies(self) -> None:
        """Whether chunks are written past the caches: what is faster between the cores of this machine.

        Neither is on all: on some CPUs a line that another core has written comes faster from that core's
        cache than from memory, on others it does not. So both are tried, in turn, and all ranks choose
        what took them less time together.
        """
        mine = torch.zeros(TRIED_BYTES, dtype=torch.uint8)
        parts = list(torch.zeros(self._size, TRIED_BYTES, dtype=torch.uint8))
        least = torch.full((2,), math.inf, dtype=torch.float64)
        for _ in range(TRIES):
            for streams in (False, True):
                self._progress.stream(streams)
                begin = time.perf_counter()
                self._try(self._exchange(ALL_GATHER, mine, [mine], parts))
                least[int(streams)] = min(float(least[int(streams)]), time.perf_counter() - begin)
        each = torch.empty(self._size, 2, dtype=torch.float64)
        self._try(self._exchange(ALL_GATHER, least, [least], list(each)))
        cached, streamed = each.sum(0).tolist()
        self._progress.stream(streamed < cached)

    def _try(self, steps: Steps) -> None:
        """Not ``_start``: a profiler has no part of it in its report."""
        name = "setting up the group"
        operation = Operation(self._progress, self._lane, name, steps, None, self._progress.timeout)
        self._progress.submit(operation, False, False)

    # --- operations --------------------------------------------------------------------------------

    def _start(self, name: str, steps: Steps, result: Any, size: int, opts: Any) -> Any:
        """A collective."""
        asynchronous = getattr(opts, "asyncOp", True)
        seconds = time_limit(opts, self._progress)
        return self._launch(self._lane, name, steps, result, size, size <= BRIEF, asynchronous, seconds)

    def _launch(
        self,
        lane: Lane,
        name: str,
        steps: Steps,
        result: Any,
        size: int,
        brief: bool,
        asynchronous: bool = True,
        seconds: float | None = None,
    ) -> Any:
        operation = Operation(self._progress, lane, name, steps, result, seconds or self._progress.timeout)
        if profiler._is_profiler_enabled:
            self._record(operation, size)
        self._progress.submit(operation, brief, asynchronous)
        if self._together is not None:
            self._together.append(operation)
        return operation

    def _record(self, operation: Operation, size: int) -> None:
        """A range in torch.profiler's report, from this call to the operation's end, on whichever thread that
        is; its name says what gloo's says in the dimensions of its inputs: what this rank brings."""
        self._progress.check()  # a range of what does not begin would never end
        what = operation.name.partition(" ")[0]
        held = size // self._size if what in ("all_gather", "gather") else size
        name = f"shm:{what}({held} bytes, group {self._group_name} of {self._size})"
        profiled = profiler.record_function(name)
        profiled.__enter__()
        profiled._call_end_callbacks_on_future(operation.get_future())

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> Any:
        works, self._together = self._together, None
        return Together(works or [])

    @staticmethod
    def _chain(exchanges: Iterable[Steps]) -> Steps:
        for steps in exchanges:
            yield from steps

    def _exchange(
        self,
        what: int,
        like: torch.Tensor,
        inputs: Sequence[torch.Tensor | None],
        outputs: Sequence[torch.Tensor | None],
        operation: tuple[str, float] | None = None,
        root: int = 0,
        count: int | None = None,
        longest: int = 0,
    ) -> Steps:
        """One exchange. inputs: one for all, or one for each rank; outputs: from each, or the one reduced."""
        size = self._size
        sends = [None if tensor is None else in_order(tensor) for tensor in inputs]
        rooms = [None if tensor is None else room_for(tensor) for tensor in outputs]
        reduce, factor, name = 0, 0, ""
        if operation is not None:
            name, number = operation
            if size > 1:
                reduce = reduction(like.dtype, name)[0]
                factor = struct.unpack("q", struct.pack("d", number))[0]
        signature = header_of(what, like.dtype, name, root)
        places = [place_of(room) for room in rooms]
        if operation is not None:
            places *= size
        total = like.numel() if count is None else count
        sources = [place_of(send) for send in sends]
        self._lane.describe(POSTS | COMPARES, signature, total, sources, places, reduce, factor, longest)
        self._agree((yield))
        for tensor, room in zip(outputs, rooms, strict=True):
            if tensor is not None and room is not None:
                if operation is not None and operation[0] == "PREMUL_SUM" and size == 1:
                    room.mul_(operation[1])
                put_back(room, tensor)

    def _agree(self, status: int) -> None:
        """ValueError, the same on all ranks, where they have come with different operations."""
        if status != DIFFERENT:
            return
        lane, segment = self._lane, self._segment
        said: dict[str, list[int]] = defaultdict(list)
        for rank in range(self._size):
            _, signature, count = segment.header(lane.area, rank, lane.before)
            said[spelled(signature, count, segment.names)].append(segment.names[rank])
        lane.before += 1  # nobody has gone further: the next operation finds all ranks in step
        segment.take(lane.area, self._rank, lane.before)
        raise ValueError(
            "shm: ranks do not agree: "
            + "; ".join(
                f"rank{'s' * (len(ranks) > 1)} {str(ranks)[1:-1]}: {what}" for what, ranks in said.items()
            )
        )

    def _check_parts(self, what: str, name: str, parts: Sequence[torch.Tensor], mine: torch.Tensor) -> None:
        if len(parts) != self._size:
            raise ValueError(
                f"shm: {what} among {self._size} ranks takes {self._size} {name}, not {len(parts)}"
            )
        part = parts[self._rank]
        if part.numel() != mine.numel() or any(part.dtype != mine.dtype for part in parts):
            raise ValueError(
                f"shm: {what}: {name} of {amounts(parts)}, "
                f"of which number {self._rank} must hold {amounts([mine])}"
            )

    def _check_whole(
        self, what: str, name: str, whole: torch.Tensor, part_name: str, part: torch.Tensor
    ) -> None:
        if whole.numel() != self._size * part.numel() or whole.dtype != part.dtype:
            raise ValueError(
                f"shm: {what}: the {name} has {amounts([whole])}, the {part_name} {amounts([part])}; among "
                f"{self._size} ranks it must have {self._size * part.numel()} {dtype_name(part.dtype)}"
            )


class Together(dist.Work):
    """Several operations as one."""

    def __init__(self, works: Sequence[Operation]):
        super().__init__()
        self.works = works

    def wait(self, timeout: Any = None) -> bool:
        return all([work.wait(timeout) for work in self.works])

    def is_completed(self) -> bool:
        return all(work.finished for work in self.works)


def time_limit(opts: Any, progress: Progress) -> float:
    """The time-out of one operation: its own, where it has one, or the group's."""
    own = getattr(opts, "timeout", None)
    return own.total_seconds() if own is not None and own.total_seconds() > 0 else progress.timeout


def in_torch(work: Operation) -> dist.Work:
    """The same work, waited for in C++, where ``wait`` is somewhat slower: the group's thread ends it.

    Torch's own DistributedDataParallel keeps the handle by which its join counts ranks (of one element) in
    C++ alone. The Python half of ours would be collected, and the wait that is left would never end.
    """
    return _create_work_from_future(work.get_future())
