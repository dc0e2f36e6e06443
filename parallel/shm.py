"""``torch.distributed`` for the processes of one host, over shared memory: ``init_process_group("shm")``.

Importing this registers the backend ``"shm"`` (``"cpu:shm"`` is the same): all collectives, send and recv, on CPU
tensors of every dtype, in groups of any size, so that DDP, FSDP2, DTensor, pipelining and checkpoints run on it
unchanged. Reductions are done in the order of ranks, 16-bit floats in float32, so all ranks get the same bits.

A Python class can not be a ``Backend`` (it has no constructor), so the group itself is ours: a subclass of
``dist.ProcessGroup``. ``dist.all_reduce`` of a small tensor then costs what Python takes to get here; a synchronous
one runs in the calling thread (``describe_all_reduce``), and everything else goes through
``parallel.shm_progress``, where waits, time-outs and dead ranks are dealt with. ``parallel.shm_segment`` is the
memory, ``parallel.shm_exchange`` what moves bytes through it, ``parallel.shm_reduce`` the arithmetic.

Errors are the same on all ranks of a collective: ValueError where they do not agree on what it is (operation,
dtype, number of elements, root), after which the group can be used; DistBackendError where a rank died, left or
did not come within the time-out, after which it can not.
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from parallel.shm_exchange import COMPARES, DIFFERENT, DONE, LINE, POSTS
from parallel.shm_progress import BRIEF, Finished, Lane, Operation, Progress, Steps
from parallel.shm_reduce import reduction, supported
from parallel.shm_segment import Segment

ALL_REDUCE, BROADCAST, REDUCE, ALL_GATHER, GATHER, SCATTER, REDUCE_SCATTER, ALL_TO_ALL, BARRIER = range(9)
_NAMES = "all_reduce broadcast reduce all_gather gather scatter reduce_scatter all_to_all barrier".split()
_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
_DTYPES = sorted(dict.fromkeys(_DTYPES), key=str)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_OPERATIONS = "SUM AVG PRODUCT MIN MAX BAND BOR BXOR PREMUL_SUM".split()
_SUM = dist.ReduceOp.SUM
_FINISHED = Finished()
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ALL_OF_ALL = 1 << 16
"""Bytes up to which three or more ranks reduce everything each, not a part each and gather the parts."""


class ShmGroup(dist.ProcessGroup):
    """The process group of backend ``"shm"``. store: of this group. names: its ranks in the world."""

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

    def set_timeout(self, timeout: timedelta) -> None:
        self._progress.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Leave the group; ranks that wait for this one get an error at once."""
        self._segment.leave()

    def abort(self) -> None:
        """End what is under way with an error, here and on the other ranks."""
        self._progress.break_off("it was aborted", self._rank)

    # --- collectives -----------------------------------------------------------------------------

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        tensor = tensors[0]
        quick = self._sums.get(tensor.dtype)
        if (
            quick is None
            or opts is None
            or opts.asyncOp
            or opts.reduceOp != _SUM
            or len(tensors) > 1
            or type(tensor) not in _PLAIN
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            return self.allreduce_coalesced(tensors, opts)
        # What is done most, and must cost little: a plain tensor, summed, waited for.
        itemsize, reduce, signature = quick
        count, lane, progress = tensor.numel(), self._lane, self._progress
        size = count * itemsize
        if (
            (self._size > 2 and size > _ALL_OF_ALL)
            or progress.failure is not None
            or lane.queue
            or not self._lock.acquire(False)
        ):
            return self.allreduce_coalesced(tensors, opts)
        try:
            lane.describe_all_reduce(signature, count, tensor.data_ptr(), size, reduce)
            status = self._run(lane.address)
            if status == DONE:
                lane.before += lane.rounds
                return _FINISHED
            steps = self._continued(status)
            operation = Operation(
                progress,
                lane,
                f"all_reduce of {count} {_name(tensor.dtype)}",
                steps,
                tensors,
                _seconds(opts, progress),
            )
            lane.queue.append(operation)
        except BaseException as error:
            progress.break_off(f"{type(error).__name__} in all_reduce", self._rank)
            raise
        finally:
            self._lock.release()
        operation.wait()
        return operation

    def _continued(self, status: int) -> Steps:
        """An exchange that has begun, and returned ``status``."""
        if status != DIFFERENT:
            status = yield
        self._agree(status)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        operation = _operation_of(opts)
        tensors = [_reducible(tensor, operation) for tensor in tensors]
        name = f"all_reduce of {_amounts(tensors)}"
        steps = self._chain(self._all_reduce(tensor, operation) for tensor in tensors)
        return self._start(name, steps, tensors, _bytes(tensors), opts)

    def _all_reduce(self, tensor: torch.Tensor, operation: tuple[str, float]) -> Steps:
        size, rank = self._size, self._rank
        if operation == ("SUM", 1.0) and size > 1 and tensor.dtype not in self._sums:
            reduce = reduction(tensor.dtype, "SUM")[0]
            signature = _signature(ALL_REDUCE, tensor.dtype, "SUM")
            self._sums[tensor.dtype] = tensor.element_size(), reduce, signature
        flat = _packed(tensor).view(-1)
        if size <= 2 or _bytes([flat]) <= _ALL_OF_ALL:
            yield from self._exchange(ALL_REDUCE, flat, [flat], [flat], operation)
        else:
            parts = list(flat.split(_part(flat, size))) + [flat[:0]] * size
            yield from self._exchange(ALL_REDUCE, flat, parts[:size], [parts[rank]], operation)
            yield from self._exchange(ALL_GATHER, flat, [parts[rank]], parts[:size])
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        nothing: list[Any] = [None] * self._size
        root = _member(opts.rootRank, self._size)
        (tensor,) = tensors
        if self._rank == root:
            steps = self._exchange(BROADCAST, tensor, [tensor], nothing, root=root)
        else:
            outputs = [*nothing[:root], tensor, *nothing[root + 1 :]]
            steps = self._exchange(BROADCAST, tensor, [None], outputs, root=root)
        name = f"broadcast of {_amounts(tensors)} from rank {self._segment.names[root]}"
        return self._start(name, steps, tensors, _bytes(tensors), opts)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        operation, root = _operation_of(opts), _member(opts.rootRank, self._size)
        (tensor,) = [_reducible(tensor, operation) for tensor in tensors]
        outputs = [tensor if self._rank == root else None]
        steps = self._exchange(REDUCE, tensor, [tensor], outputs, operation, root)
        name = f"reduce of {_amounts(tensors)} to rank {self._segment.names[root]}"
        return self._start(name, steps, tensors, _bytes(tensors), opts)

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        (parts,), (mine,) = outputs, inputs
        self._check_parts("all_gather", "output tensors", parts, mine)
        steps = self._all_gather(parts, mine)
        return self._start(f"all_gather of {_amounts(inputs)}", steps, outputs, _bytes(parts), opts)

    def _all_gather(self, parts: Sequence[torch.Tensor], mine: torch.Tensor) -> Steps:
        count = sum(part.numel() for part in parts)
        return self._exchange(ALL_GATHER, mine, [mine], parts, count=count)

    def allgather_coalesced(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> Any:
        lists = [[of_rank[i] for of_rank in outputs] for i in range(len(inputs))]
        for parts, mine in zip(lists, inputs, strict=True):
            self._check_parts("all_gather", "output tensors", parts, mine)
        steps = self._chain(self._all_gather(*pair) for pair in zip(lists, inputs, strict=True))
        name = f"all_gather of {_amounts(inputs)}"
        return self._start(name, steps, outputs, self._size * _bytes(inputs), opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self._check_whole("all_gather_into_tensor", "output", output, "input", mine)
        steps = self._chain(map(self._all_gather_single, outputs, inputs))
        return self._start(f"all_gather of {_amounts(inputs)}", steps, outputs, _bytes(outputs), opts)

    def _all_gather_single(self, output: torch.Tensor, mine: torch.Tensor) -> Steps:
        whole = _room(output)
        yield from self._exchange(ALL_GATHER, mine, [mine], _equal_parts(whole, self._size))
        _return(whole, output)

    def gather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any
    ) -> Any:
        (mine,), root = inputs, _member(opts.rootRank, self._size)
        parts: Sequence[Any] = [None] * self._size
        if self._rank == root:
            (parts,) = outputs
            self._check_parts("gather", "gather_list", parts, mine)
        steps = self._exchange(GATHER, mine, [mine], parts, root=root)
        name = f"gather of {_amounts(inputs)} to rank {self._segment.names[root]}"
        return self._start(name, steps, outputs, self._size * _bytes(inputs), opts)

    def scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any
    ) -> Any:
        (mine,), root = outputs, _member(opts.rootRank, self._size)
        parts: Sequence[Any] = [None] * self._size
        if self._rank == root:
            (parts,) = inputs
            self._check_parts("scatter", "scatter_list", parts, mine)
        targets: list[Any] = [None] * self._size
        targets[root] = mine
        steps = self._exchange(SCATTER, mine, parts, targets, root=root)
        name = f"scatter of {_amounts(outputs)} from rank {self._segment.names[root]}"
        return self._start(name, steps, outputs, self._size * _bytes(outputs), opts)

    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> Any:
        operation = _operation_of(opts)
        (mine,) = [_reducible(output, operation) for output in outputs]
        (parts,) = [[_reducible(part, operation) for part in parts] for parts in inputs]
        self._check_parts("reduce_scatter", "input tensors", parts, mine)
        count = sum(part.numel() for part in parts)
        steps = self._exchange(REDUCE_SCATTER, mine, parts, [mine], operation, count=count)
        name = f"reduce_scatter of {_amounts(outputs)}"
        return self._start(name, steps, outputs, _bytes(parts), opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        operation = _operation_of(opts)
        mine = [_reducible(output, operation) for output in outputs]
        wholes = [_reducible(whole, operation) for whole in inputs]
        for output, whole in zip(mine, wholes, strict=True):
            self._check_whole("reduce_scatter_tensor", "input", whole, "output", output)
        steps = self._chain(
            self._exchange(
                REDUCE_SCATTER,
                output,
                _equal_parts(_packed(whole), self._size),
                [output],
                operation,
                count=whole.numel(),
            )
            for output, whole in zip(mine, wholes, strict=True)
        )
        name = f"reduce_scatter of {_amounts(outputs)}"
        return self._start(name, steps, outputs, _bytes(inputs), opts)

    def alltoall(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for what, tensors in (("output", outputs), ("input", inputs)):
            if len(tensors) != self._size:
                raise ValueError(
                    f"shm: all_to_all takes one {what} for each of {self._size} ranks, not {len(tensors)}"
                )
        steps = self._all_to_all(outputs, inputs)
        return self._start(f"all_to_all of {_amounts(inputs)}", steps, outputs, _bytes(inputs), opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        sends = self._split("input", input, input_sizes)
        whole = _room(output)
        steps = self._to_all_single(output, whole, self._split("output", whole, output_sizes), sends)
        return self._start(f"all_to_all of {_amounts([input])}", steps, [output], _bytes([input]), opts)

    def _split(self, what: str, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        rows = tensor.shape[0] if tensor.dim() else 0
        if not sizes and rows % self._size:
            raise ValueError(
                f"shm: all_to_all of an {what} of {rows} rows among {self._size} ranks needs {what}_split_sizes"
            )
        sizes = sizes or [rows // self._size] * self._size
        if len(sizes) != self._size or sum(sizes) != rows:
            raise ValueError(
                f"shm: {what}_split_sizes {list(sizes)} are not {self._size} numbers that sum to {rows} rows"
            )
        return list(_packed(tensor).split(list(sizes)))

    def _to_all_single(self, output: torch.Tensor, whole: torch.Tensor, targets: Any, sends: Any) -> Steps:
        yield from self._all_to_all(targets, sends)
        _return(whole, output)

    def _all_to_all(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Steps:
        """Ranks tell each other how many elements they send and expect, since nobody else knows."""
        size, rank = self._size, self._rank
        counts = [tensor.numel() for tensor in (*inputs, *outputs)]
        table = torch.empty(size, 2, size, dtype=torch.int64)
        yield from self._exchange(ALL_TO_ALL, inputs[0], [torch.tensor(counts)], list(table), count=0)
        sent, expected = table[:, 0], table[:, 1].T
        if not torch.equal(sent, expected):
            wrong = (sent != expected).nonzero().tolist()
            names = self._segment.names
            raise ValueError(
                "shm: all_to_all: "
                + "; ".join(
                    f"rank {names[a]} sends {sent[a, b]} elements to rank {names[b]}, which expects {expected[a, b]}"
                    for a, b in wrong
                )
            )
        longest = int(sent.max()) * inputs[rank].element_size()
        yield from self._exchange(ALL_TO_ALL, inputs[0], inputs, outputs, count=0, longest=longest)

    def barrier(self, opts: Any = None) -> Any:
        nothing = torch.empty(0, dtype=torch.uint8)
        steps = self._exchange(BARRIER, nothing, [nothing], [nothing] * self._size)
        return self._start("barrier", steps, [], 0, opts)

    # Names that older versions of torch call, and C++ callers in all of them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- from rank to rank -----------------------------------------------------------------------

    def _channel(self, source: int, target: int) -> Lane:
        lane = self._channels.get((source, target))
        if lane is None:
            area = self._segment.channel(source, target)
            lane = self._progress.lane(area, (source, target), int(self._rank == target))
            self._channels[source, target] = lane
        return lane

    def _peer(self, peer: int) -> int:
        if _member(peer, self._size) == self._rank:
            raise ValueError(f"shm: rank {self._segment.names[peer]} cannot send to and receive from itself")
        return peer

    def send(self, tensors: Sequence[torch.Tensor], target: int, tag: int = 0) -> Any:
        (tensor,), lane = tensors, self._channel(self._rank, self._peer(target))
        name = f"send of {_amounts(tensors)} to rank {self._segment.names[target]} (tag {tag})"
        return self._launch(lane, name, self._send(lane, tensor, tag), tensors, True)

    def _send(self, lane: Lane, tensor: torch.Tensor, tag: int) -> Steps:
        packed = _packed(tensor)
        lane.describe(POSTS, tag, _message(packed), [_place(packed)], [(0, 0)] * 2)
        yield

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> Any:
        (tensor,), lane = tensors, self._channel(self._peer(source), self._rank)
        name = f"recv of {_amounts(tensors)} from rank {self._segment.names[source]} (tag {tag})"
        return self._launch(lane, name, self._recv(source, tensor, tag), tensors, self._arrived(source))

    def _arrived(self, source: int) -> bool:
        lane = self._channel(source, self._rank)
        return self._segment.header(lane.area, 0, lane.before)[0] > lane.before

    def _recv(self, source: int, tensor: torch.Tensor, tag: int) -> Steps:
        """The next message with this tag; others that come before it are kept until somebody asks for them."""
        lane, room, kept = self._channel(source, self._rank), _room(tensor), self._unexpected[source]
        if kept[tag]:
            message, stored = kept[tag].popleft()
        else:
            while True:
                lane.describe(COMPARES, tag, _message(room), [(0, 0)], [_place(room), (0, 0)])
                if (yield) != DIFFERENT:
                    _return(room, tensor)
                    return
                _, found, message = self._segment.header(lane.area, 0, lane.before)
                stored = torch.empty(message >> 8, dtype=torch.uint8)
                yield from self._keep(lane, found, message, stored)
                if found == tag:
                    break
                kept[found].append((message, stored))
        if message != _message(room):
            dtype = _DTYPES[message & 0xFF]
            raise ValueError(
                f"shm: rank {self._segment.names[source]} has sent {(message >> 8) // dtype.itemsize} {_name(dtype)} "
                f"(tag {tag}), rank {self._segment.names[self._rank]} receives {_amounts([tensor])}"
            )
        tensor.copy_(stored.view(tensor.dtype).view(tensor.shape))

    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> Any:
        return AnySource(self, tensors, tag)

    def _ready(self, source: int, tag: int) -> bool:
        """There is a message from this rank with this tag. Messages before it are put aside."""
        lane, kept = self._channel(source, self._rank), self._unexpected[source]
        while not kept[tag] and not lane.queue and self._arrived(source):
            _, found, message = self._segment.header(lane.area, 0, lane.before)
            if found == tag:
                return True
            stored = torch.empty(message >> 8, dtype=torch.uint8)
            steps = self._keep(lane, found, message, stored)
            self._launch(lane, "recv", steps, [], True).wait()
            kept[found].append((message, stored))
        return bool(kept[tag])

    def _keep(self, lane: Lane, tag: int, message: int, stored: torch.Tensor) -> Steps:
        lane.describe(0, tag, message, [(0, 0)], [_place(stored), (0, 0)])
        yield

    # --- starting --------------------------------------------------------------------------------

    def _start(self, name: str, steps: Steps, result: Any, size: int, opts: Any) -> Any:
        """A collective."""
        asynchronous = getattr(opts, "asyncOp", True)
        seconds = _seconds(opts, self._progress)
        return self._launch(self._lane, name, steps, result, size <= BRIEF, asynchronous, seconds)

    def _launch(
        self,
        lane: Lane,
        name: str,
        steps: Steps,
        result: Any,
        brief: bool,
        asynchronous: bool = True,
        seconds: float | None = None,
    ) -> Any:
        operation = Operation(self._progress, lane, name, steps, result, seconds or self._progress.timeout)
        self._progress.submit(operation, brief, asynchronous)
        if self._together is not None:
            self._together.append(operation)
        return operation

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
        """One exchange. inputs: one for all, or one for each rank; outputs: from each rank, or the one reduced."""
        size = self._size
        sends = [None if tensor is None else _packed(tensor) for tensor in inputs]
        rooms = [None if tensor is None else _room(tensor) for tensor in outputs]
        reduce, factor, name = 0, 0, ""
        if operation is not None:
            name, number = operation
            if size > 1:
                reduce = reduction(like.dtype, name)[0]
                factor = struct.unpack("q", struct.pack("d", number))[0]
        signature = _signature(what, like.dtype, name, root)
        places = [_place(room) for room in rooms]
        if operation is not None:
            places *= size
        total = like.numel() if count is None else count
        sources = [_place(send) for send in sends]
        self._lane.describe(POSTS | COMPARES, signature, total, sources, places, reduce, factor, longest)
        self._agree((yield))
        for tensor, room in zip(outputs, rooms, strict=True):
            if tensor is not None and room is not None:
                if operation is not None and operation[0] == "PREMUL_SUM" and size == 1:
                    room.mul_(operation[1])
                _return(room, tensor)

    def _agree(self, status: int) -> None:
        """ValueError, the same on all ranks, where they have come with different operations."""
        if status != DIFFERENT:
            return
        lane, segment = self._lane, self._segment
        said: dict[str, list[int]] = defaultdict(list)
        for rank in range(self._size):
            _, signature, count = segment.header(lane.area, rank, lane.before)
            said[_spell(signature, count, segment.names)].append(segment.names[rank])
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
                f"shm: {what}: {name} of {_amounts(parts)}, of which number {self._rank} must hold {_amounts([mine])}"
            )

    def _check_whole(
        self, what: str, name: str, whole: torch.Tensor, part_name: str, part: torch.Tensor
    ) -> None:
        if whole.numel() != self._size * part.numel() or whole.dtype != part.dtype:
            raise ValueError(
                f"shm: {what}: the {name} has {_amounts([whole])}, the {part_name} {_amounts([part])}; among "
                f"{self._size} ranks it must have {self._size * part.numel()} {_name(part.dtype)}"
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


class AnySource(dist.Work):
    """recv from whoever sends first; goes on while somebody waits for it or asks."""

    def __init__(self, group: ShmGroup, tensors: Sequence[torch.Tensor], tag: int):
        super().__init__()
        self.group, self.tensors, self.tag = group, tensors, tag
        self.work: Any = None
        self.source = -1

    def is_completed(self) -> bool:
        group = self.group
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        if self.work is None:
            self.source = next((rank for rank in others if group._ready(rank, self.tag)), -1)
            if self.source >= 0:
                self.work = group.recv(self.tensors, self.source, self.tag)
        return self.work is not None and self.work.is_completed()

    def wait(self, timeout: Any = None) -> bool:
        segment, progress = self.group._segment, self.group._progress
        seconds = progress.timeout if timeout is None else timeout.total_seconds()
        begun = time.monotonic()
        what = f"recv of {_amounts(self.tensors)} from any rank (tag {self.tag})"
        while not self.is_completed() and self.work is None:
            progress.check()
            waited = time.monotonic() - begun
            if waited > seconds:
                raise dist.DistBackendError(
                    f"shm: time-out: rank {segment.names[segment.rank]} has waited {seconds:g} s in {what}"
                )
            dead = segment.dead()
            if len(dead) == segment.size - 1 and not self.is_completed():
                fates = "; ".join(map(segment.describe, dead))
                raise dist.DistBackendError(
                    f"shm: {fates}; rank {segment.names[segment.rank]} waited in {what}"
                )
            time.sleep(min(0.002, waited / 8))
        return self.work.wait()

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank


# --- tensors ----------------------------------------------------------------------------------------


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements in order, in memory that can be read by address."""
    if not tensor.is_cpu:
        raise ValueError(f"shm takes tensors of the CPU, not of {tensor.device}; gloo or nccl take those")
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.trigger_wait()
    return tensor.resolve_conj().resolve_neg().contiguous()


def _room(tensor: torch.Tensor) -> torch.Tensor:
    """Where to write what ``_return`` brings into the tensor."""
    if not tensor.is_cpu:
        raise ValueError(f"shm takes tensors of the CPU, not of {tensor.device}; gloo or nccl take those")
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return tensor if plain else torch.empty(tensor.shape, dtype=tensor.dtype)


def _return(room: torch.Tensor, tensor: torch.Tensor) -> None:
    if room is not tensor:
        tensor.copy_(room)


def _place(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, bytes)."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _reducible(tensor: torch.Tensor, operation: tuple[str, float]) -> torch.Tensor:
    if tensor.is_complex() and operation[0] in ("SUM", "AVG", "PREMUL_SUM"):
        tensor = torch.view_as_real(tensor)
    other = supported(tensor.dtype, operation[0])
    if other is not None:
        raise TypeError(f"shm does not reduce {tensor.dtype} with {operation[0]}; it takes {other}")
    return tensor


def _equal_parts(whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(whole.view(size, -1)) if whole.numel() else [whole.view(-1)] * size


def _part(flat: torch.Tensor, size: int) -> int:
    """Elements of the part of each rank: equal but for the last, on borders of cache lines."""
    line = max(1, LINE // flat.element_size())
    return -(-flat.numel() // (size * line)) * line


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- words ------------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def _amounts(tensors: Sequence[torch.Tensor]) -> str:
    """Such as "3 + 5 float32"."""
    if len(tensors) > 4:
        return f"{len(tensors)} tensors"
    kinds = " and ".join(dict.fromkeys(_name(tensor.dtype) for tensor in tensors))
    return f"{' + '.join(str(tensor.numel()) for tensor in tensors)} {kinds}"


def _signature(what: int, dtype: torch.dtype, reduce: str = "", root: int = 0) -> int:
    """What all ranks have to agree on, beside the number of elements."""
    code = 1 + _OPERATIONS.index(reduce) if reduce else 0
    return what | _CODES[dtype] << 8 | code << 16 | root << 24


def _spell(signature: int, count: int, names: Sequence[int]) -> str:
    what, dtype = signature & 0xFF, _DTYPES[signature >> 8 & 0xFF]
    code, root = signature >> 16 & 0xFF, signature >> 24
    if what == BARRIER:
        return "barrier"
    text = _NAMES[what] + (f" {_OPERATIONS[code - 1]}" if code else "")
    text += f" of {count} {_name(dtype)}" if what != ALL_TO_ALL else f" of {_name(dtype)}"
    ends = {BROADCAST: "from", SCATTER: "from", REDUCE: "to", GATHER: "to"}
    return text + (f" {ends[what]} rank {names[root]}" if what in ends else "")


def _message(tensor: torch.Tensor) -> int:
    """The bytes and the dtype of a message, as its header says them."""
    return tensor.numel() * tensor.element_size() << 8 | _CODES[tensor.dtype]


def _operation_of(opts: Any) -> tuple[str, float]:
    """(name, factor) of the ReduceOp in torch's options."""
    if opts is None:
        return "SUM", 1.0
    kind, factor = opts.reduceOp.__getstate__()
    return kind.name, 1.0 if factor is None else float(factor)


def _member(rank: int, size: int) -> int:
    if not 0 <= rank < size:
        raise ValueError(f"shm: rank {rank} is not in a group of {size} ranks")
    return rank


def _seconds(opts: Any, progress: Progress) -> float:
    """The time-out of one operation: its own, where it has one, or the group's."""
    own = getattr(opts, "timeout", None)
    return own.total_seconds() if own is not None and own.total_seconds() > 0 else progress.timeout


def _create(options: Any, backend_options: Any) -> ShmGroup:
    return ShmGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.global_ranks_in_group,
        options.group_id,
    )


if "SHM" not in dist.Backend._plugins:
    dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])
