"""``torch.distributed`` for the processes of one host, over shared memory: ``init_process_group("shm")``.

Importing this registers the backend ``"shm"`` (``"cpu:shm"`` is the same): all collectives, send and recv,
on CPU tensors of every dtype, in groups of any size, so that DDP, FSDP2, DTensor, pipelining and
checkpoints run on it unchanged. Reductions are done in the order of ranks, 16-bit floats in float32, so all
ranks get the same bits.

A Python class can not be a ``Backend`` (it has no constructor), so the group itself is ours: a subclass of
``dist.ProcessGroup``. ``dist.all_reduce`` of a small tensor then costs what Python takes to get here; a
synchronous one runs in the calling thread (``describe_all_reduce``), and everything else goes through
``parallel.shm_progress``, where waits, time-outs and dead ranks are dealt with. ``parallel.shm_segment`` is
the memory, ``parallel.shm_exchange`` what moves bytes through it, ``parallel.shm_reduce`` the arithmetic.

While torch.profiler records, each operation is a range in its report, ``shm:all_reduce(4000 bytes, group 0 of
2)``, from the call to the end; ``perflab trace`` makes of it what gloo's ranges are. It costs nothing else.

Errors are the same on all ranks of a collective: ValueError where they do not agree on what it is
(operation, dtype, number of elements, root), after which the group can be used; DistBackendError where a
rank died, left or did not come within the time-out, after which it can not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from parallel.shm_agreement import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    BARRIER,
    BROADCAST,
    GATHER,
    REDUCE,
    REDUCE_SCATTER,
    SCATTER,
    amounts,
    checked_rank,
    dtype_name,
    header_of,
    reduction_of,
)
from parallel.shm_exchange import DIFFERENT, DONE
from parallel.shm_group import in_torch, time_limit
from parallel.shm_messages import Messages
from parallel.shm_progress import Finished, Operation, Steps
from parallel.shm_reduce import reduction
from parallel.shm_tensors import (
    bytes_of,
    equal_parts,
    in_order,
    part_size,
    put_back,
    reducible,
    room_for,
)

_SUM = dist.ReduceOp.SUM
_FINISHED = Finished()
_PLAIN = (torch.Tensor, torch.nn.Parameter)
ALL_OF_ALL_BYTES = 1 << 16
"""Bytes up to which three or more ranks reduce everything each, not a part each and gather the parts."""


class ShmGroup(Messages):
    """The process group of backend ``"shm"``: what torch calls."""

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
            or profiler._is_profiler_enabled
            or type(tensor) not in _PLAIN
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            return self.allreduce_coalesced(tensors, opts)
        # What is done most, and must cost little: a plain tensor, summed, waited for.
        itemsize, reduce, signature = quick
        count, lane, progress = tensor.numel(), self._lane, self._progress
        size = count * itemsize
        if (
            (self._size > 2 and size > ALL_OF_ALL_BYTES)
            or progress.failure is not None
            or not self._lock.acquire(False)
        ):
            return self.allreduce_coalesced(tensors, opts)
        if lane.queue:  # only under the lock does no other thread begin what stands there
            self._lock.release()
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
                f"all_reduce of {count} {dtype_name(tensor.dtype)}",
                steps,
                tensors,
                time_limit(opts, progress),
            )
            lane.queue.appendleft(operation)  # before what other threads have queued: the block is in use
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
        operation = reduction_of(opts)
        tensors = [reducible(tensor, operation) for tensor in tensors]
        name = f"all_reduce of {amounts(tensors)}"
        steps = self._chain(self._all_reduce(tensor, operation) for tensor in tensors)
        work = self._start(name, steps, tensors, bytes_of(tensors), opts)
        if getattr(opts, "asyncOp", True) and sum(tensor.numel() for tensor in tensors) == 1:
            return in_torch(work)
        return work

    def _all_reduce(self, tensor: torch.Tensor, operation: tuple[str, float]) -> Steps:
        size, rank = self._size, self._rank
        if operation == ("SUM", 1.0) and size > 1 and tensor.dtype not in self._sums:
            reduce = reduction(tensor.dtype, "SUM")[0]
            signature = header_of(ALL_REDUCE, tensor.dtype, "SUM")
            self._sums[tensor.dtype] = tensor.element_size(), reduce, signature
        flat = in_order(tensor).view(-1)
        if size <= 2 or bytes_of([flat]) <= ALL_OF_ALL_BYTES:
            yield from self._exchange(ALL_REDUCE, flat, [flat], [flat], operation)
        else:
            parts = list(flat.split(part_size(flat, size))) + [flat[:0]] * size
            yield from self._exchange(ALL_REDUCE, flat, parts[:size], [parts[rank]], operation)
            yield from self._exchange(ALL_GATHER, flat, [parts[rank]], parts[:size])
        if not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        nothing: list[Any] = [None] * self._size
        root = checked_rank(opts.rootRank, self._size)
        (tensor,) = tensors
        if self._rank == root:
            steps = self._exchange(BROADCAST, tensor, [tensor], nothing, root=root)
        else:
            outputs = [*nothing[:root], tensor, *nothing[root + 1 :]]
            steps = self._exchange(BROADCAST, tensor, [None], outputs, root=root)
        name = f"broadcast of {amounts(tensors)} from rank {self._segment.names[root]}"
        return self._start(name, steps, tensors, bytes_of(tensors), opts)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        operation, root = reduction_of(opts), checked_rank(opts.rootRank, self._size)
        (tensor,) = [reducible(tensor, operation) for tensor in tensors]
        outputs = [tensor if self._rank == root else None]
        steps = self._exchange(REDUCE, tensor, [tensor], outputs, operation, root)
        name = f"reduce of {amounts(tensors)} to rank {self._segment.names[root]}"
        return self._start(name, steps, tensors, bytes_of(tensors), opts)

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        (parts,), (mine,) = outputs, inputs
        self._check_parts("all_gather", "output tensors", parts, mine)
        steps = self._all_gather(parts, mine)
        return self._start(f"all_gather of {amounts(inputs)}", steps, outputs, bytes_of(parts), opts)

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
        name = f"all_gather of {amounts(inputs)}"
        return self._start(name, steps, outputs, self._size * bytes_of(inputs), opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self._check_whole("all_gather_into_tensor", "output", output, "input", mine)
        steps = self._chain(map(self._all_gather_single, outputs, inputs))
        return self._start(f"all_gather of {amounts(inputs)}", steps, outputs, bytes_of(outputs), opts)

    def _all_gather_single(self, output: torch.Tensor, mine: torch.Tensor) -> Steps:
        whole = room_for(output)
        yield from self._exchange(ALL_GATHER, mine, [mine], equal_parts(whole, self._size))
        put_back(whole, output)

    def gather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any
    ) -> Any:
        (mine,), root = inputs, checked_rank(opts.rootRank, self._size)
        parts: Sequence[Any] = [None] * self._size
        if self._rank == root:
            (parts,) = outputs
            self._check_parts("gather", "gather_list", parts, mine)
        steps = self._exchange(GATHER, mine, [mine], parts, root=root)
        name = f"gather of {amounts(inputs)} to rank {self._segment.names[root]}"
        return self._start(name, steps, outputs, self._size * bytes_of(inputs), opts)

    def scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any
    ) -> Any:
        (mine,), root = outputs, checked_rank(opts.rootRank, self._size)
        parts: Sequence[Any] = [None] * self._size
        if self._rank == root:
            (parts,) = inputs
            self._check_parts("scatter", "scatter_list", parts, mine)
        targets: list[Any] = [None] * self._size
        targets[root] = mine
        steps = self._exchange(SCATTER, mine, parts, targets, root=root)
        name = f"scatter of {amounts(outputs)} from rank {self._segment.names[root]}"
        return self._start(name, steps, outputs, self._size * bytes_of(outputs), opts)

    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> Any:
        operation = reduction_of(opts)
        (mine,) = [reducible(output, operation) for output in outputs]
        (parts,) = [[reducible(part, operation) for part in parts] for parts in inputs]
        self._check_parts("reduce_scatter", "input tensors", parts, mine)
        count = sum(part.numel() for part in parts)
        steps = self._exchange(REDUCE_SCATTER, mine, parts, [mine], operation, count=count)
        name = f"reduce_scatter of {amounts(outputs)}"
        return self._start(name, steps, outputs, bytes_of(parts), opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        operation = reduction_of(opts)
        mine = [reducible(output, operation) for output in outputs]
        wholes = [reducible(whole, operation) for whole in inputs]
        for output, whole in zip(mine, wholes, strict=True):
            self._check_whole("reduce_scatter_tensor", "input", whole, "output", output)
        steps = self._chain(
            self._exchange(
                REDUCE_SCATTER,
                output,
                equal_parts(in_order(whole), self._size),
                [output],
                operation,
                count=whole.numel(),
            )
            for output, whole in zip(mine, wholes, strict=True)
        )
        name = f"reduce_scatter of {amounts(outputs)}"
        return self._start(name, steps, outputs, bytes_of(inputs), opts)

    def alltoall(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for what, tensors in (("output", outputs), ("input", inputs)):
            if len(tensors) != self._size:
                raise ValueError(
                    f"shm: all_to_all takes one {what} for each of {self._size} ranks, not {len(tensors)}"
                )
        steps = self._all_to_all(outputs, inputs)
        return self._start(f"all_to_all of {amounts(inputs)}", steps, outputs, bytes_of(inputs), opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        sends = self._split("input", input, input_sizes)
        whole = room_for(output)
        steps = self._to_all_single(output, whole, self._split("output", whole, output_sizes), sends)
        return self._start(f"all_to_all of {amounts([input])}", steps, [output], bytes_of([input]), opts)

    def _split(self, what: str, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        rows = tensor.shape[0] if tensor.dim() else 0
        if not sizes and rows % self._size:
            raise ValueError(
                f"shm: all_to_all of {rows} {what} rows among {self._size} ranks needs {what}_split_sizes"
            )
        sizes = sizes or [rows // self._size] * self._size
        if len(sizes) != self._size or sum(sizes) != rows:
            raise ValueError(
                f"shm: {what}_split_sizes {list(sizes)} are not {self._size} numbers that sum to {rows} rows"
            )
        return list(in_order(tensor).split(list(sizes)))

    def _to_all_single(self, output: torch.Tensor, whole: torch.Tensor, targets: Any, sends: Any) -> Steps:
        yield from self._all_to_all(targets, sends)
        put_back(whole, output)

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
                    f"rank {names[a]} sends {sent[a, b]} elements to rank {names[b]}, "
                    f"which expects {expected[a, b]}"
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
