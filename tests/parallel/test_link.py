"""The link counts every byte, takes the time it should, and changes nothing else."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from parallel import link
from parallel.link_lanes import Lanes
from parallel.link_work import LinkWork

FLOAT = 4


def every_collective():
    """(payload, calls, sent, received) after one call of each, and whether all results were right."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.full((6,), float(rank))
    everyone = torch.arange(size, dtype=torch.float32)
    right, root = [], rank == 0
    with link.counted() as traffic:
        value = mine.clone()
        dist.all_reduce(value)
        right.append(bool((value == everyone.sum()).all()))
        value = mine.clone()
        dist.broadcast(value, size - 1)
        right.append(bool((value == size - 1).all()))
        value = mine.clone()
        dist.reduce(value, 0)
        right.append(not root or bool((value == everyone.sum()).all()))
        parts = [torch.empty(6) for _ in range(size)]
        dist.all_gather(parts, mine)
        right.append([part[0].item() for part in parts] == everyone.tolist())
        flat = torch.empty(6 * size)
        dist.all_gather_into_tensor(flat, mine)
        right.append(torch.equal(flat, torch.cat(parts)))
        out = torch.empty(6)
        dist.reduce_scatter_tensor(out, flat)
        right.append(bool((out == rank * size).all()))
        dist.reduce_scatter(out, parts)
        right.append(bool((out == rank * size).all()))
        exchanged = torch.empty(6 * size)
        dist.all_to_all_single(exchanged, flat)
        right.append(bool((exchanged == rank).all()))
        swapped = [torch.empty(6) for _ in range(size)]
        dist.all_to_all(swapped, parts)
        right.append(bool((torch.cat(swapped) == rank).all()))
        dist.gather(mine, [torch.empty(6) for _ in range(size)] if root else None, 0)
        dist.scatter(out, [part + 1 for part in parts] if root else None, 0)
        right.append(bool((out == rank + 1).all()))
        dist.barrier()
        dist.send(mine, (rank + 1) % size) if rank % 2 else dist.recv(out, (rank - 1) % size)
        right.append(bool(rank % 2) or bool((out == (rank - 1) % size).all()))
        objects = [None] * size
        dist.all_gather_object(objects, rank)
        right.append(objects == list(range(size)))
    return dict(traffic.payload), dict(traffic.calls), traffic.sent, traffic.received, right


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_collective_is_counted(ranks, world_size):
    found = ranks.run(world_size, every_collective, backend="link")
    for rank, (payload, calls, sent, received, right) in enumerate(found):
        assert all(right), (rank, right)
        one, root, odd = 6 * FLOAT, rank == 0, bool(rank % 2)
        objects = payload.pop("all_gather") - 2 * one * world_size
        assert 0 < objects < 1000
        assert payload == {
            "all_reduce": one,
            "broadcast": one,
            "reduce": one,
            "reduce_scatter": 2 * one * world_size,
            "all_to_all": 2 * one * world_size,
            "gather": one * world_size if root else one,
            "scatter": one * world_size if root else one,
        } | ({"send": one} if odd else {})
        assert (sent, received) == ((one, 0) if odd else (0, one))
        assert calls == {
            "all_reduce": 1,
            "broadcast": 1,
            "reduce": 1,
            "all_gather": 4,
            "reduce_scatter": 2,
            "all_to_all": 2,
            "gather": 1,
            "scatter": 1,
            "barrier": 1,
            "send" if odd else "recv": 1,
        }


def batched_and_coalesced():
    """batch_isend_irecv round a ring, coalesced collectives, a sub-group, functional collectives."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine, theirs = torch.full((5,), float(rank)), torch.empty(5)
    group, functional = dist.new_group([0, 1]), torch.ops._c10d_functional
    with link.counted() as traffic:
        operations = [
            dist.P2POp(dist.isend, mine, (rank + 1) % size),
            dist.P2POp(dist.irecv, theirs, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        with dist._coalescing_manager(async_ops=True) as works:
            for value in (torch.ones(3), torch.ones(4)):
                dist.all_reduce(value)
        works.wait()
        if rank < 2:
            dist.all_reduce(torch.ones(7), group=group)
        total = functional.wait_tensor(
            functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD.group_name)
        )
    assert (theirs == (rank - 1) % size).all()
    assert (total == size).all()
    return dict(traffic.payload), dict(traffic.calls)


def test_batches_coalescing_subgroups_and_functional_collectives_are_counted(ranks):
    for rank, (payload, calls) in enumerate(ranks.run(3, batched_and_coalesced, backend="link")):
        inside = rank < 2
        assert payload == {"send": 5 * FLOAT, "all_reduce": (3 + 4 + 7 * inside + 2) * FLOAT}
        assert calls == {"send": 1, "recv": 1, "all_reduce": 2 + inside}


def by_oneself():
    """Every collective over a group of one rank: results are right, calls are counted, no bytes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = [dist.new_group([one], backend="link") for one in range(size)][rank]
    mine, flat, out = torch.full((6,), float(rank)), torch.empty(6), torch.empty(6)
    with link.counted() as traffic:
        dist.all_reduce(mine, group=group)
        dist.broadcast(mine, rank, group=group)
        dist.reduce(mine, rank, group=group)
        dist.all_gather([out], mine, group=group)
        dist.all_gather_into_tensor(flat, mine, group=group)
        dist.reduce_scatter_tensor(out, flat, group=group)
        dist.all_to_all_single(out, flat, group=group)
        dist.gather(mine, [out], rank, group=group)
        dist.scatter(out, [mine], rank, group=group)
        dist.barrier(group=group)
    assert torch.equal(out, mine)
    with link.counted() as both:
        dist.all_reduce(mine, group=group)
        dist.all_reduce(torch.ones(2))
    return dict(traffic.payload), traffic.calls.total(), dict(both.payload)


def test_a_group_of_one_communicates_nothing(ranks):
    for payload, calls, both in ranks.run(2, by_oneself, backend="link"):
        assert payload == {}
        assert calls == 10
        assert both == {"all_reduce": 2 * FLOAT}
    assert all(link.seconds(name, 100, 1, 1.0, 1.0) == 0 for name in link.COSTS if name not in link.P2P)


def by_older_names():
    """What torch 2.11 and its strategies call, as methods of the group."""
    group, size = dist.group.WORLD, dist.get_world_size()
    mine, flat = torch.ones(3), torch.empty(3 * size)
    calls = [
        lambda: group._allgather_base(flat, mine),
        lambda: group.allgather_into_tensor_coalesced([flat, flat.clone()], [mine, mine]),
        lambda: group._reduce_scatter_base(mine.clone(), flat),
        lambda: group.reduce_scatter_tensor_coalesced([mine.clone()], [flat]),
        lambda: group.alltoall_base(flat.clone(), flat, [], []),
        lambda: group.allreduce(mine.clone(), dist.ReduceOp.SUM),
        lambda: group.broadcast(mine, root=0),
    ]
    with link.counted() as traffic:
        for call in calls:
            call().wait()
    with pytest.raises(RuntimeError, match="oalescing"):
        group._start_coalescing(torch.device("cpu"))  # gloo does not
    with link.counted() as after:
        dist.all_reduce(mine)
    return dict(traffic.payload), dict(after.payload)


def test_older_names_are_counted(ranks):
    part, whole = 3 * FLOAT, 6 * FLOAT
    for payload, after in ranks.run(2, by_older_names, backend="link"):
        assert payload == {
            "all_gather": 3 * whole,
            "reduce_scatter": 2 * whole,
            "all_to_all": whole,
            "all_reduce": part,
            "broadcast": part,
        }
        assert after == {"all_reduce": part}


WIDTH, DEPTH = 24, 3
ATTEMPTS = 8


def model():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])


def gradients(net):
    return torch.cat(
        [
            (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).flatten()
            for p in net.parameters()
        ]
    )


def strategies(latency):
    """{strategy: (largest gradient error, payload, seconds waited, seconds)} of PyTorch's own on a link."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend=link.wrap("gloo", latency))
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(1)
    inputs, found = torch.randn(8 * size, WIDTH), {}
    net = model()
    net(inputs).square().mean().backward()
    right = gradients(net)

    def step(name, net, batch):
        with link.counted() as traffic:
            start = time.perf_counter()
            net(batch).square().mean().backward()
            seconds = time.perf_counter() - start
        error = (gradients(net) - right).abs().max().item()
        found[name] = error, dict(traffic.payload), traffic.waited_seconds, seconds

    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.001, process_group=group)
    step("ddp", ddp, inputs.chunk(size)[rank])
    net = model()
    for layer in net:
        fully_shard(layer, mesh=mesh)
    step("fsdp", fully_shard(net, mesh=mesh), inputs.chunk(size)[rank])
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    step("tensor", parallelize_module(model(), mesh, plan), inputs)
    net = model()
    part = net[:1] if rank == 0 else net[1:]
    stage = PipelineStage(part, rank, size, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda output, _: output.square().mean())
    arguments = ([inputs], {}) if rank == 0 else ([], {"target": inputs})
    schedule.step(*arguments[0], **arguments[1])  # the first also sends shapes
    part.zero_grad()
    start = time.perf_counter()
    with link.counted() as traffic:
        schedule.step(*arguments[0], **arguments[1])
    seconds = time.perf_counter() - start
    mine = gradients(part)
    first = 0 if rank == 0 else WIDTH * (WIDTH + 1)
    error = (mine - right[first : first + mine.numel()]).abs().max().item()
    found["pipeline"] = error, dict(traffic.payload), traffic.waited_seconds, seconds
    return found


def within(attempts, measure):
    """Measure until nothing is too late, ``attempts`` times at most: a busy machine delays some of them, what
    is wrong with the link all. measure: what was too late."""
    for _ in range(attempts):
        late = measure()
        if not late:
            return
    pytest.fail(f"in each of {attempts} attempts; in the last: {late}")


def strategies_are_counted(ranks, latency):
    """[(strategy, seconds waited)] that waited less than the latencies that nothing has to hide."""
    size = 2
    parameters = DEPTH * WIDTH * (WIDTH + 1) * FLOAT
    activations = 8 * size * WIDTH * FLOAT
    calls = {"ddp": 2, "fsdp": 3, "tensor": 2, "pipeline": 1}  # latencies one after another, at least
    hidden = []
    for found in ranks.run(size, strategies, latency, backend="link"):
        assert max(error for error, *_ in found.values()) < 1e-6
        assert found["ddp"][1] == {"all_reduce": parameters}
        assert found["fsdp"][1] == {
            "all_gather": 2 * parameters,
            "reduce_scatter": parameters,
        }
        assert found["tensor"][1]["all_reduce"] == activations
        assert found["pipeline"][1] == {"send": activations}
        for name, (_, _, waited, seconds) in found.items():
            assert waited <= seconds, name
            assert 0.99 * latency * calls[name] <= seconds, name
            if waited < 0.9 * latency * calls[name]:
                hidden.append((name, waited))
    return hidden


@pytest.mark.parametrize("latency", [0.0, 0.02])
def test_pytorchs_own_strategies_run_on_it_and_are_counted(ranks, latency):
    """A rank that loses its core between a call and the wait for it waits less: its latency was hidden."""
    within(ATTEMPTS, lambda: strategies_are_counted(ranks, latency))


def timed(name, *arguments):
    """Seconds that a function of this file takes between ranks that start together, on a link."""
    group = dist.new_group(backend=link.wrap("gloo", *arguments[0]))
    found = []
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        result = globals()[name](group, *arguments[1:])
        found.append((time.perf_counter() - start, result))
    return min(found, key=lambda pair: pair[0])  # a busy machine adds, and takes nothing away


def all_reduce_of(group, count, times=1, asynchronous=False):
    works = [dist.all_reduce(torch.ones(count), group=group, async_op=asynchronous) for _ in range(times)]
    if asynchronous:
        assert not works[-1].is_completed()
        for work in works:
            work.wait()
        assert all(work.is_completed() and work.is_success() for work in works)


def hidden_behind(group, compute):
    """Compute that costs the processor nothing, beside an all-reduce; the CPU seconds it took."""
    before = time.process_time()
    with link.counted() as traffic:
        work = dist.all_reduce(torch.ones(10), group=group, async_op=True)
        time.sleep(compute)
        work.wait()
    return time.process_time() - before, traffic.waited_seconds


def from_one_to_all(group, count):
    """The root sends to each other rank, one after another; each receives one message."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for work in [dist.isend(torch.ones(count), peer, group=group) for peer in range(1, size)]:
            work.wait()
    else:
        dist.recv(torch.empty(count), 0, group=group)


def from_all_to_one(group, count):
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for work in [dist.irecv(torch.empty(count), peer, group=group) for peer in range(1, size)]:
            work.wait()
    else:
        dist.send(torch.ones(count), 0, group=group)


def round_a_ring(group, count):
    rank, size = dist.get_rank(), dist.get_world_size()
    send = dist.P2POp(dist.isend, torch.ones(count), (rank + 1) % size, group=group)
    receive = dist.P2POp(dist.irecv, torch.empty(count), (rank - 1) % size, group=group)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()


LATE = 0.08  # seconds that a transfer may take longer than the link


def transfers(ranks, name, expected, *arguments, least=None, world_size=2, latency=0.05, per_byte=0.0):
    """[(rank, seconds)] that did not take as long as expected. least: what they take whenever ranks start."""
    found = ranks.run(world_size, timed, name, (latency, per_byte), *arguments, backend="link")
    for (seconds, _), shortest in zip(found, least or expected, strict=True):
        assert shortest <= seconds + 1e-3, (name, seconds, shortest)
    return [
        (rank, seconds)
        for rank, ((seconds, _), wanted) in enumerate(zip(found, expected, strict=True))
        if not wanted <= seconds + 1e-3 <= wanted + LATE
    ]


@pytest.mark.alone
def test_a_transfer_takes_the_time_of_the_link(ranks):
    def check(*arguments, **options):
        within(ATTEMPTS, lambda: transfers(ranks, *arguments, **options))

    ring = link.seconds("all_reduce", 4000, 2, 0.05, 1e-5)
    assert ring == pytest.approx(2 * 0.05 + 4000 * 1e-5)
    check("all_reduce_of", [ring] * 2, 1000, per_byte=1e-5)
    check("all_reduce_of", [3 * ring] * 2, 1000, 3, True, per_byte=1e-5)  # they queue up
    received = [0.15, 0.05, 0.05, 0.05]  # by who starts later than the root, the last of its messages
    check("from_one_to_all", [0.15, 0.05, 0.10, 0.15], 10, world_size=4, least=received)
    check("from_all_to_one", [0.15, 0.05, 0.05, 0.05], 10, world_size=4)
    check("round_a_ring", [0.05] * 3, 10, world_size=3)  # it sends and receives at the same time


def exposed_beside(ranks, compute, exposed):
    """[(seconds, seconds of CPU, seconds waited)] of ranks for which it was too much."""
    late, latency = [], 0.1  # the all-reduce takes 0.2
    for seconds, (cpu, waited) in ranks.run(
        2, timed, "hidden_behind", (latency, 0.0), compute, backend="link"
    ):
        assert max(0.2, compute) <= seconds + 1e-3
        if seconds >= max(0.2, compute) + LATE or cpu >= 0.05 or abs(waited - exposed) >= LATE / 2:
            late.append((seconds, cpu, waited))
    return late


@pytest.mark.alone
def test_waiting_is_hidden_behind_compute_and_costs_no_processor_time(ranks):
    for compute, exposed in ((0.0, 0.2), (0.12, 0.08), (0.25, 0.0)):
        within(ATTEMPTS, functools.partial(exposed_beside, ranks, compute, exposed))


def futures(latency):
    """Whether futures are set by themselves, callbacks run, and one thread does it all."""
    group = dist.new_group(backend=link.wrap("gloo", latency))
    before, seen = threading.active_count(), threading.Event()
    works = [dist.all_reduce(torch.ones(4), group=group, async_op=True) for _ in range(20)]
    sends = [dist.isend(torch.ones(3), 1 - dist.get_rank(), group=group) for _ in range(20)]
    works[-1].get_future().add_done_callback(lambda future: seen.set())
    threads = threading.active_count() - before
    assert seen.wait(10)
    assert works[-1].get_future().value()[0].tolist() == [2.0] * 4
    for _ in sends:
        dist.recv(torch.empty(3), 1 - dist.get_rank(), group=group)
    for work in sends:
        work.wait()
    return threads, torch._C._current_graph_task_id()


def test_works_complete_by_themselves_from_one_thread(ranks):
    assert max(threads for threads, _ in ranks.run(2, futures, 0.001, backend="link")) <= 1
    assert ranks.run(2, futures, 0.0, backend="link")[0][0] == 0


def out_of_order(latency):
    """A receive that is posted first is answered after a collective that is issued later."""
    group, rank = dist.new_group(backend=link.wrap("gloo", latency)), dist.get_rank()
    value = torch.empty(2)
    if rank == 0:
        receive = dist.irecv(value, 1, group=group)
        dist.all_reduce(torch.ones(1), group=group)
        receive.wait()
    else:
        dist.all_reduce(torch.ones(1), group=group)
        dist.send(torch.ones(2), 0, group=group)
    anyone = torch.empty(3)
    if rank == 0:
        assert dist.recv(anyone, group=group) == 1
    else:
        dist.send(torch.ones(3), 0, group=group)
    return value.sum().item()


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_nothing_waits_for_what_was_posted_before(ranks, latency):
    assert ranks.run(2, out_of_order, latency, backend="link")[0] == 2.0


def backward_alone(group):
    net = DistributedDataParallel(nn.Linear(2, 2), process_group=group, init_sync=False)
    net(torch.ones(1, 2)).sum().backward()


ALONE = {
    "all_reduce": lambda group: dist.all_reduce(torch.ones(6), group=group),
    "future": lambda group: dist.all_reduce(torch.ones(6), group=group, async_op=True).get_future().wait(),
    "recv": lambda group: dist.recv(torch.ones(6), 1, group=group),
    "ddp": backward_alone,
}


def alone(latency):
    """{kind: (seconds, notes)} of what rank 0 is told that communicates with one that does not answer."""
    name, patience = link.wrap("gloo", latency), timedelta(seconds=1)
    groups = {kind: dist.new_group(backend=name, timeout=patience) for kind in ALONE}

    def told(kind):
        start = time.perf_counter()
        with pytest.raises(RuntimeError) as caught:
            ALONE[kind](groups[kind])
        return time.perf_counter() - start, "\n".join(getattr(caught.value, "__notes__", []))

    found = {}
    if dist.get_rank() == 0:
        with ThreadPoolExecutor(len(ALONE)) as pool:  # they wait at the same time
            found = dict(zip(ALONE, pool.map(told, ALONE), strict=True))
    dist.barrier()
    return found


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_what_the_inner_backend_raises_arrives_and_says_who_waits(ranks, latency):
    found = ranks.run(2, alone, latency, backend="link")[0]
    assert found.keys() == ALONE.keys()
    assert all(0.9 < seconds < 5 for seconds, _ in found.values()), found
    assert "rank 0 of 2" in found["all_reduce"][1]
    assert "all_reduce of 24 bytes" in found["all_reduce"][1]
    assert "recv of 24 bytes, from rank 1" in found["recv"][1]


def other_arguments():
    group = dist.group.WORLD
    assert dist.get_backend(group) == "link"
    assert group.name() == "link"
    assert group.group_name
    assert dist.get_process_group_ranks(group) == [0, 1]
    with link.counted() as outer:
        group.allreduce(torch.ones(3)).wait()
        with link.counted() as inner:
            group.broadcast(torch.ones(2), 0).wait()
    dist.all_reduce(torch.ones(1))
    return dict(outer.payload), dict(inner.payload)


def test_counts_nest_and_end(ranks):
    for outer, inner in ranks.run(2, other_arguments, backend="link"):
        assert inner == {"broadcast": 2 * FLOAT}
        assert outer == {"all_reduce": 3 * FLOAT, "broadcast": 2 * FLOAT}


def test_wrong_arguments_are_named():
    assert link.wrap("gloo", 1e-3, 2e-8) == link.wrap("gloo", 1e-3, 2e-8)
    assert link.wrap("gloo", 1e-3) != link.wrap("gloo", 2e-3)
    with pytest.raises(ValueError, match=r"unknown backend 'carrier' to wrap: know .*gloo"):
        link.wrap("carrier")
    with pytest.raises(ValueError, match="latency must be a finite number"):
        link.wrap("gloo", latency=-1.0)
    with pytest.raises(ValueError, match="seconds_per_byte must be a finite number"):
        link.wrap("gloo", seconds_per_byte=float("inf"))


def on_a_device():
    """Milliseconds of the device until a delayed all-reduce is done, by its event and by its future."""
    device, group = torch.device("cuda", 0), dist.new_group(backend=link.wrap("nccl"))
    value, found = torch.ones(10, device=device), []
    for wait in (lambda work: work.wait(), lambda work: work.get_future().wait()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        lanes = Lanes(0.05, 0.0)
        wait(LinkWork(lambda: group.inner.allreduce([value]), "test", lanes, "all_reduce", 0.05, device))
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    with link.counted() as traffic:
        dist.all_reduce(value, group=group)
    return found, dict(traffic.payload), value.tolist()


@pytest.mark.gpu
def test_delays_on_a_device(ranks):
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        pytest.skip("needs a CUDA device and NCCL")
    (times, payload, value), *_ = ranks.run(1, on_a_device, backend="link")
    assert all(50 <= time + 1 < 150 for time in times)
    assert payload == {}
    assert value == [1.0] * 10
