"""The shared-memory backend: right on every dtype and in every group, and PyTorch on it, unmodified."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import shm_exchange
from parallel.shm_progress import Operation

SIZES = (0, 1, 2, 17, 1009, 32_768, 100_003)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


def numbers(rank, size, dtype, seed=0):
    """What a rank contributes: small whole numbers, exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(1, 4, (size,), generator=generator).to(dtype)


# --- collectives -----------------------------------------------------------------------------------


def reductions(every_pair=False):
    """every_pair: of dtype and operation, each of which is compiled once for a machine; else a sample."""
    rank, size = dist.get_rank(), dist.get_world_size()
    plain = {
        dist.ReduceOp.SUM: lambda x: x.sum(0),
        dist.ReduceOp.PRODUCT: lambda x: x.prod(0),
        dist.ReduceOp.MIN: lambda x: x.amin(0),
        dist.ReduceOp.MAX: lambda x: x.amax(0),
    }
    for dtype in DTYPES:
        for operation, reference in plain.items():
            if (
                not every_pair
                and operation != dist.ReduceOp.SUM
                and dtype not in (torch.bfloat16, torch.int32)
            ):
                continue
            for count in SIZES if dtype == torch.float32 else (17, 40_001):
                x = numbers(rank, count, dtype)
                dist.all_reduce(x, operation)
                every = torch.stack([numbers(q, count, dtype) for q in range(size)])
                assert torch.equal(x, reference(every.double()).to(dtype)), (dtype, operation, count)
    for dtype in (torch.uint8, torch.int8, torch.int64) if every_pair else (torch.int8,):
        every = torch.stack([numbers(q, 100, dtype) for q in range(size)])
        for operation, function in (
            (dist.ReduceOp.BAND, torch.bitwise_and),
            (dist.ReduceOp.BOR, torch.bitwise_or),
            (dist.ReduceOp.BXOR, torch.bitwise_xor),
        ):
            x, expected = every[rank].clone(), every[0]
            for other in every[1:]:
                expected = function(expected, other)
            dist.all_reduce(x, operation)
            assert torch.equal(x, expected)
    x = torch.tensor([rank == 0, True, False])
    dist.all_reduce(x)
    assert x.tolist() == [True, True, False]
    x = torch.full((1003,), rank + 1, dtype=torch.complex64) * 1j
    dist.all_reduce(x)
    assert (x == 1j * size * (size + 1) / 2).all()
    for x in (torch.full((9,), 1.0 + rank), torch.full((9,), 1.0 + rank, dtype=torch.bfloat16)):
        y = x.clone()
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert (x == (size + 1) / 2).all()
        dist.all_reduce(y, dist._make_nccl_premul_sum(2.0))
        assert (y == size * (size + 1)).all()
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    x[rank % 3] = float("nan")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    assert x.isnan().tolist() == [q < size for q in range(3)]
    return True


def rounding():
    """16-bit sums are rounded once; all ranks hold the same bits, those of a sum in the order of ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (1009, 70_001):
            every = [
                torch.randn(count, generator=torch.Generator().manual_seed(q)).to(dtype) for q in range(size)
            ]
            expected = every[0].float()
            for other in every[1:]:
                expected = expected + other.float()
            x = every[rank].clone()
            dist.all_reduce(x)
            assert torch.equal(x, expected.to(dtype)), (dtype, count)
            y = every[rank].clone()
            dist.all_reduce(y, dist.ReduceOp.AVG)
            assert torch.equal(y, (expected / size).to(dtype))
    return True


def movements():
    rank, size = dist.get_rank(), dist.get_world_size()
    for count in SIZES:
        for dtype in (torch.float32, torch.int8, torch.bool, torch.complex64):
            every = [numbers(q, count, dtype) for q in range(size)]
            mine, root = every[rank], size - 1
            x = mine.clone()
            dist.broadcast(x, root)
            assert torch.equal(x, every[root])
            outputs = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(outputs, mine)
            assert all(map(torch.equal, outputs, every))
            whole = torch.empty(size * count, dtype=dtype)
            dist.all_gather_into_tensor(whole, mine)
            assert torch.equal(whole, torch.cat(every))
            outputs = [torch.empty_like(mine) for _ in range(size)] if rank == root else None
            dist.gather(mine, outputs, root)
            assert rank != root or all(map(torch.equal, outputs, every))
            x = torch.empty_like(mine)
            dist.scatter(x, every if rank == root else None, root)
            assert torch.equal(x, mine)
            targets = [numbers(q, count, dtype, seed=rank) for q in range(size)]
            outputs = [torch.empty_like(mine) for _ in range(size)]
            dist.all_to_all(outputs, targets)
            assert all(torch.equal(outputs[q], numbers(rank, count, dtype, seed=q)) for q in range(size))
            if dtype in (torch.float32, torch.int8):
                x = mine.clone()
                dist.reduce(x, root)
                assert torch.equal(x, sum(every) if rank == root else mine)
                x = torch.empty(count, dtype=dtype)
                inputs = [numbers(rank, count, dtype, seed=q) for q in range(size)]
                expected = sum(numbers(q, count, dtype, seed=rank) for q in range(size))
                dist.reduce_scatter(x, inputs)
                assert torch.equal(x, expected)
                x.zero_()
                dist.reduce_scatter_tensor(x, torch.cat(inputs))
                assert torch.equal(x, expected)
    return True


def shapes():
    """Uneven, transposed and strided tensors; objects; the coalescing manager; functional collectives."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.arange(12.0).view(3, 4).T * (rank + 1)
    dist.all_reduce(x)
    assert torch.equal(x, torch.arange(12.0).view(3, 4).T * (size * (size + 1) // 2))
    wide = torch.zeros(5, 2 * size)
    dist.all_gather([wide[:, 2 * q] for q in range(size)], torch.full((5,), 1.0 + rank))
    assert torch.equal(wide[0, ::2], torch.arange(1.0, size + 1))
    assert (wide[:, 1::2] == 0).all()
    uneven = [torch.empty(q + 1) for q in range(size)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    assert all((uneven[q] == q).all() for q in range(size))
    # Rank r sends r + q rows to rank q.
    sends, takes = [rank + q for q in range(size)], [q + rank for q in range(size)]
    output = torch.empty(sum(takes), 3)
    dist.all_to_all_single(output, torch.full((sum(sends), 3), float(rank)), takes, sends)
    assert torch.equal(output[:, 0], torch.repeat_interleave(torch.arange(float(size)), torch.tensor(takes)))
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    assert objects == [{"rank": q, "text": "x" * q} for q in range(size)]
    several = [rank, "two", None] if rank == 0 else [None] * 3
    dist.broadcast_object_list(several)
    assert several == [0, "two", None]
    tensors = [torch.full((n,), 1.0 + rank) for n in (3, 1000, 0)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    assert all((tensor == size * (size + 1) / 2).all() for tensor in tensors)
    wholes = [torch.empty(n * size) for n in (4, 7)]
    with dist._coalescing_manager():
        for whole, n in zip(wholes, (4, 7), strict=True):
            dist.all_gather_into_tensor(whole, torch.full((n,), float(rank)))
    assert all(torch.equal(w, torch.arange(float(size)).repeat_interleave(len(w) // size)) for w in wholes)
    import torch.distributed._functional_collectives as functional

    summed = functional.all_reduce(torch.ones(5), "sum", dist.group.WORLD) + 0
    gathered = functional.all_gather_tensor(torch.ones(2, 2) * rank, 1, dist.group.WORLD) + 0
    part = functional.reduce_scatter_tensor(torch.ones(size * 2), "avg", 0, dist.group.WORLD) + 0
    assert summed.tolist() == [size] * 5
    assert part.tolist() == [1.0, 1.0]
    assert torch.equal(gathered[0], torch.arange(float(size)).repeat_interleave(2))
    dist.all_reduce(functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD))
    return True


def asynchronous():
    """Many at once, waited for in any order, by themselves, through futures, from two threads."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [torch.full((n,), 1.0 + rank) for n in (1, 200_000, 5, 300_000, 70)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all((tensor == size * (size + 1) / 2).all() for tensor in tensors)
    x = torch.full((500_000,), 1.0 + rank)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future()
    deadline = time.monotonic() + 20
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.001)  # nobody waits: it completes by itself
    assert work.is_completed()
    assert (x == size * (size + 1) / 2).all()
    assert future.wait()[0] is x
    assert work.wait()
    # One rank waits in a second group while the other has yet to be waited for in the first.
    group = dist.new_group(list(range(size)), backend="shm")
    first, second = torch.ones(10), torch.ones(10)
    if rank == 0:
        work = dist.all_reduce(first, async_op=True)
        dist.all_reduce(second, group=group)
        work.wait()
    else:
        dist.all_reduce(first)
        dist.all_reduce(second, group=group)
    assert first.tolist() == second.tolist() == [size] * 10

    def repeat(where, found):
        for _ in range(30):
            value = torch.ones(100)
            dist.all_reduce(value, group=where)
            found.append(value[0].item())

    found = []
    threads = [threading.Thread(target=repeat, args=(where, found)) for where in (None, group)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [size] * 60
    return True


def between_the_lines():
    """Another thread starts an all_reduce while one that is waited for begins: before its exchange is
    described, and while it is in flight. Each is done with its own numbers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.distributed_c10d._get_default_group()
    exchange, lock, others = group._run, group._lock, []
    dist.all_reduce(torch.ones(1))  # from the second of a dtype on it is one exchange of the caller's thread

    def from_another_thread():
        if not works:
            others.append(torch.full((3000,), 10.0 + rank))
            thread = threading.Thread(target=lambda: works.append(dist.all_reduce(others[-1], async_op=True)))
            thread.start()
            thread.join()

    class Lock:
        def acquire(self, blocking=True):
            from_another_thread()
            return lock.acquire()

        release = staticmethod(lock.release)

    def run(address):
        status = exchange(address)
        from_another_thread()
        return status

    class Patient:
        """The thread that finished the last one may have the lock still: then that is waited for, where the
        group would do without."""

        def acquire(self, blocking=True):
            return lock.acquire()

        release = staticmethod(lock.release)

    works = []
    for others_come_first, patch in ((True, {"_lock": Lock()}), (False, {"_lock": Patient(), "_run": run})):
        mine = torch.full((700,), 1.0 + rank)
        if rank == 0:
            vars(group).update(patch)
            dist.all_reduce(mine)
            vars(group).update(_lock=lock, _run=exchange)
            works.pop().wait()
        else:
            time.sleep(0.2)  # what rank 0 begins first is in flight until then
            other = torch.full((3000,), 10.0 + rank)
            for x in (other, mine) if others_come_first else (mine, other):
                dist.all_reduce(x)
            others.append(other)
        assert (mine == size * (size + 1) / 2).all(), patch
        assert (others[-1] == sum(10.0 + q for q in range(size))).all(), patch
    return True


def messages():
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    for count in SIZES:
        mine, got = torch.full((count,), float(rank)), torch.empty(count)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, got, before)]
        )
        for work in works:
            work.wait()
        assert (got == before).all()
    # All send more than a channel holds, then receive by tag in the other order.
    big = [torch.full((100_000,), 10.0 * rank + tag) for tag in range(3)]
    works = [dist.isend(big[tag], after, tag=tag) for tag in range(3)]
    got = [torch.empty(100_000) for _ in range(3)]
    for tag in (2, 0, 1):
        dist.recv(got[tag], before, tag=tag)
    for work in works:
        work.wait()
    assert [x[0].item() for x in got] == [10.0 * before + tag for tag in range(3)]
    if rank == 0:
        seen, value = [], torch.empty(3, dtype=torch.int64)
        for _ in range(size - 1):
            seen.append((dist.recv(value, tag=7), value[0].item()))
        assert sorted(seen) == [(q, q) for q in range(1, size)]
    else:
        dist.send(torch.full((3,), rank), 0, tag=8)
        dist.send(torch.full((3,), rank), 0, tag=7)
    if rank == 0:
        for q in range(1, size):
            dist.recv(value, q, tag=8)
            assert value.tolist() == [q] * 3
    strided = torch.zeros(4, 2)
    work = dist.isend(torch.arange(8.0).view(2, 4).T, after)
    dist.recv(strided.T, before)
    work.wait()
    dist.barrier()
    return True


def ways_of_copying():
    """Past the caches or not, the same values. A new group takes what its ranks together find faster."""
    from parallel import shm_group

    rank, size = dist.get_rank(), dist.get_world_size()
    for streams in (True, False):
        dist.group.WORLD._progress.stream(streams)
        assert dist.group.WORLD._lane.words[shm_exchange.STREAMS] == streams
        x = numbers(rank, 1_000_003, torch.float32)
        dist.all_reduce(x)
        assert torch.equal(x, sum(numbers(q, 1_000_003, torch.float32) for q in range(size)))

    class Clock:
        """On which a copy past the caches takes that much more than the second of another."""

        def __init__(self, more):
            self.now, self.calls, self.more = 0.0, 0, more

        def perf_counter(self):
            self.calls += 1
            ended, streamed = self.calls % 2 == 0, (self.calls - 1) // 2 % 2 == 1
            self.now += 1.0 + (self.more if ended and streamed else 0.0)
            return self.now

    true = shm_group.time
    by_rank = (((1.0, 2.0), False), ((-0.5, -0.5), True), ((-0.3, 0.9), False), ((0.1, -0.8), True))
    for more, chosen in by_rank:
        shm_group.time = Clock(more[rank])
        try:
            made = dist.new_group(backend="shm")
        finally:
            shm_group.time = true
        assert made.streams is chosen
        assert made._lane.words[shm_exchange.STREAMS] == chosen
        x = torch.full((3,), float(rank))
        dist.send(x, 1, group=made) if rank == 0 else dist.recv(x, 0, group=made)
        assert x.tolist() == [0, 0, 0]
        lanes = made._progress.lanes
        assert len(lanes) == 2
        assert all(lane.words[shm_exchange.STREAMS] == chosen for lane in lanes)
        dist.destroy_process_group(made)
    return True


def groups():
    rank, size = dist.get_rank(), dist.get_world_size()
    for ranks in ([0], list(range(size)), [size - 1, 0][: min(2, size)], list(range(0, size, 2))):
        group = dist.new_group(sorted(set(ranks)), backend="shm")
        if rank in ranks:
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=group)
            assert x.item() == sum(set(ranks))
            y = torch.tensor([float(rank)])
            dist.broadcast(y, max(ranks), group=group)
            assert y.item() == max(ranks)
            dist.destroy_process_group(group)
    return True


@pytest.mark.parametrize(
    ("world_size", "check"),
    [
        *[(n, reductions) for n in (1, 2, 3)],
        *[(n, rounding) for n in (2, 4)],
        *[(n, movements) for n in (1, 2, 3)],
        *[(n, shapes) for n in (1, 2, 4)],
        *[(n, asynchronous) for n in (2, 3)],
        (2, between_the_lines),
        *[(n, messages) for n in (2, 4)],
        *[(n, groups) for n in (1, 4)],
        (2, ways_of_copying),
    ],
)
def test_collectives_are_right(ranks, world_size, check):
    assert ranks.run(world_size, check, backend="shm") == [True] * world_size


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_every_dtype_is_reduced_in_every_way(ranks):
    assert ranks.run(3, reductions, True, backend="shm", timeout=500) == [True] * 3


def test_the_device_may_be_named(ranks):
    assert ranks.run(2, reductions_in_a_named_group) == [True] * 2


def reductions_in_a_named_group():
    import parallel.shm  # noqa: F401

    group = dist.new_group(backend="cpu:shm")
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert dist.get_backend(group) in ("shm", "cpu:shm", "custom")
    return x.tolist() == [2.0] * 3


# --- unmodified PyTorch ------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)
    ).double()


def batch():
    return torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def alone(steps=3):
    """Parameters of the model after some steps in one process."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        net(batch()).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def train(net, inputs, steps=3):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    found = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]
    torch.testing.assert_close(found, alone(steps), rtol=1e-10, atol=1e-12)


def data_parallel():
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = batch().chunk(size)[rank]
    train(nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=0.002), mine)
    from torch.distributed.fsdp import fully_shard

    net = network()
    for layer in (net[0], net[2], net[4]):
        fully_shard(layer)
    train(fully_shard(net), mine)
    return True


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, size = dist.get_rank(), dist.get_world_size()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if size == 2:
        train(parallelize_module(network(), init_device_mesh("cpu", (size,)), plan), batch())
        return True
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = fully_shard(parallelize_module(network(), mesh["tensor"], plan), mesh=mesh["data"])
    train(net, batch().chunk(2)[rank // 2])
    train(fully_shard(network(), mesh=mesh), batch().chunk(4)[rank])  # HSDP
    return True


def pipelined():
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, size = dist.get_rank(), dist.get_world_size()
    net, expected = network(), network()
    part = net[:2] if rank == 0 else net[2:]
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda output, _: output.square().mean())
    for _ in range(2):  # the second receives into tensors that by then require gradients
        part.zero_grad(), expected.zero_grad()
        schedule.step(*([batch()] if rank == 0 else []), **({"target": batch()} if rank == size - 1 else {}))
        expected(batch()).square().mean().backward()
    whole = expected[:2] if rank == 0 else expected[2:]
    torch.testing.assert_close(
        [p.grad for p in part.parameters()], [p.grad for p in whole.parameters()], rtol=1e-10, atol=1e-12
    )
    return True


def checkpointed(folder):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(network())
    checkpoint.save(net.state_dict(), checkpoint_id=folder)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    checkpoint.load(state, checkpoint_id=folder)
    assert all(
        torch.equal(state[name].full_tensor(), value) for name, value in network().state_dict().items()
    )
    return True


@pytest.mark.parametrize(
    ("world_size", "check"),
    [(2, data_parallel), (3, data_parallel), (2, tensor_parallel), (4, tensor_parallel), (2, pipelined)],
)
def test_unmodified_pytorch_equals_one_process(ranks, world_size, check):
    assert ranks.run(world_size, check, backend="shm") == [True] * world_size


def test_distributed_checkpoints(ranks, tmp_path):
    assert ranks.run(2, checkpointed, str(tmp_path), backend="shm") == [True] * 2


@pytest.mark.parametrize("error", [None, dist.DistBackendError("it was aborted")])
def test_a_future_is_fulfilled_once_whoever_ends_its_operation_meanwhile(error):
    """Another thread ends it between the making of its future and what comes after; and once more."""
    operation = Operation(None, None, "all_reduce", iter(()), ["result"], 1.0)

    class Settling:
        """The operation's lock, behind whose first release another thread gets its turn."""

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()
            if not self.had_its_turn:
                self.had_its_turn = True
                operation.settle(error)

        lock, had_its_turn = threading.Lock(), False

    operation._settling = Settling()
    future = operation.get_future()
    operation.settle(None)  # what has been broken off meanwhile does not succeed
    assert future.done()
    assert operation.error is error
    if error is None:
        assert future.value() == ["result"]
    else:
        with pytest.raises(Exception, match="aborted"):
            future.value()
