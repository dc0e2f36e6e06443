"""Our collectives give what torch.distributed's give, send what was predicted, and fail on all ranks
alike."""

import inspect
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel import collective_costs as costs
from parallel import collectives, link
from parallel.collective_costs import ALGORITHMS

SIZES = (0, 1, 7, 64)
EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def values(count, dtype, rank, size):
    """Small integers, whose sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank + 100 * count)
    return torch.randint(0, max(1, 200 // size // 2), (count,), generator=generator).to(dtype)


def differences(dtype, sizes):
    """[what differs] from torch.distributed, over all collectives and algorithms; and from the prediction."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong, root = [], size - 1

    def compare(name, ours, theirs, count, algorithm=None, whole=None, **more):
        for checked in (True, False):
            with link.counted() as traffic:
                result = ours(checked)
            what = f"{name} {algorithm} of {count} {dtype}, rank {rank}, checked {checked}"
            if not torch.equal(result, theirs):
                wrong.append(f"{what}: {result} not {theirs}")
            predicted = collectives.predict_communication(
                name,
                count if whole is None else whole,
                dtype.itemsize,
                size,
                rank,
                algorithm=algorithm,
                checked=checked,
                **more,
            )
            if traffic.payload != predicted or traffic.sent != predicted.get("send", 0):
                wrong.append(f"{what}: sent {dict(traffic.payload)}, predicted {predicted}")

    for count in sizes:
        mine = values(count, dtype, rank, size)
        everyone = [values(count, dtype, other, size) for other in range(size)]
        total = torch.stack(everyone).sum(0).to(dtype)
        for algorithm in ALGORITHMS["broadcast"]:

            def broadcast(checked, algorithm=algorithm, mine=mine):
                result = mine.clone()
                collectives.broadcast(result, root, algorithm=algorithm, checked=checked)
                return result

            compare("broadcast", broadcast, everyone[root], count, algorithm, root=root)
        for algorithm in ALGORITHMS["reduce"]:

            def reduce(checked, algorithm=algorithm, mine=mine):
                result = mine.clone()
                collectives.reduce(result, root, algorithm=algorithm, checked=checked)
                return result

            compare("reduce", reduce, total if rank == root else mine, count, algorithm, root=root)
        for algorithm in ALGORITHMS["all_reduce"]:

            def all_reduce(checked, algorithm=algorithm, mine=mine):
                result = mine.clone()
                collectives.all_reduce(result, algorithm=algorithm, checked=checked)
                return result

            compare("all_reduce", all_reduce, total, count, algorithm)
        for algorithm in ALGORITHMS["all_gather"]:

            def all_gather(checked, algorithm=algorithm, mine=mine):
                result = mine.new_empty(size * len(mine))
                collectives.all_gather_into_tensor(result, mine, algorithm=algorithm, checked=checked)
                return result

            compare("all_gather", all_gather, torch.cat(everyone), count, algorithm, size * count)
        parts = torch.cat([values(count, dtype, rank * size + part, size) for part in range(size)])
        kept = parts.clone()
        scattered = [
            torch.stack([values(count, dtype, r * size + part, size) for r in range(size)]).sum(0).to(dtype)
            for part in range(size)
        ]

        def reduce_scatter(checked, parts=parts, count=count):
            result = parts.new_empty(count)
            collectives.reduce_scatter_tensor(result, parts, checked=checked)
            return result

        compare("reduce_scatter", reduce_scatter, scattered[rank], count, None, size * count)

        def all_to_all(checked, parts=parts):
            result = torch.empty_like(parts)
            collectives.all_to_all_single(result, parts, checked=checked)
            return result

        swapped = torch.cat([values(count, dtype, other * size + rank, size) for other in range(size)])
        compare("all_to_all", all_to_all, swapped, count, None, size * count)

        def gather(checked, mine=mine):
            results = [torch.empty_like(mine) for _ in range(size)] if rank == root else None
            collectives.gather(mine, results, root, checked=checked)
            return torch.cat(results) if results else mine

        gathered = torch.cat(everyone) if rank == root else mine
        compare("gather", gather, gathered, count, None, size * count, root=root)

        def scatter(checked, parts=parts, mine=mine, count=count):
            result = torch.empty_like(mine)
            given = list(parts.view(size, count)) if rank == root else None
            collectives.scatter(result, given, root, checked=checked)
            return result

        compare(
            "scatter",
            scatter,
            values(count, dtype, root * size + rank, size),
            count,
            None,
            size * count,
            root=root,
        )
        if not torch.equal(parts, kept):
            wrong.append(f"the input of {count} was changed")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_and_sent_bytes(ranks, world_size):
    for wrong in ranks.run(world_size, differences, torch.float32, SIZES, backend="link"):
        assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_every_dtype(ranks, dtype):
    for wrong in ranks.run(3, differences, dtype, (5,), backend="link"):
        assert not wrong, "\n".join(wrong[:5])


@pytest.mark.proof
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_every_dtype_and_size_in_every_world(ranks, dtype, world_size):
    for wrong in ranks.run(world_size, differences, dtype, (*SIZES, 2, 3, 1009), backend="link"):
        assert not wrong, "\n".join(wrong[:5])


def against_gloo():
    """Against dist.* itself: other reductions, shapes of several dimensions, non-contiguous, uneven
    splits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
        for algorithm in ALGORITHMS["all_reduce"]:
            mine = torch.randn(3, 5, dtype=torch.float64)
            ours, theirs = mine.clone(), mine.clone()
            collectives.all_reduce(ours, op, algorithm=algorithm)
            dist.all_reduce(theirs, op)
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        mine = torch.randint(0, 256, (9,))
        ours, theirs = mine.clone(), mine.clone()
        collectives.all_reduce(ours, op)
        dist.all_reduce(theirs, op)
        assert torch.equal(ours, theirs)
    average = torch.full((4,), float(rank))
    collectives.all_reduce(average, dist.ReduceOp.AVG)
    assert torch.equal(average, torch.full((4,), (size - 1) / 2))
    for algorithm in ALGORITHMS["reduce"]:
        average = torch.full((4,), float(rank))
        collectives.reduce(average, 0, dist.ReduceOp.AVG, algorithm=algorithm)
        assert torch.equal(average, torch.full((4,), (size - 1) / 2 if rank == 0 else float(rank)))
    part = torch.empty(2)
    collectives.reduce_scatter_tensor(part, torch.full((2 * size,), float(rank)), dist.ReduceOp.AVG)
    assert torch.equal(part, torch.full((2,), (size - 1) / 2))
    whole = torch.zeros(4, 6)
    columns = whole[:, ::2]
    columns += rank
    collectives.all_reduce(columns)
    assert torch.equal(whole[:, ::2], torch.full((4, 3), size * (size - 1) / 2))
    assert not whole[:, 1::2].any()
    parameter = torch.nn.Parameter(torch.full((3,), float(rank)))
    collectives.broadcast(parameter, 0)
    assert parameter.tolist() == [0.0] * 3
    sent = [(rank + other) % 3 for other in range(size)]
    received = [(other + rank) % 3 for other in range(size)]
    rows = torch.randn(sum(sent), 2)
    ours, theirs = torch.empty(sum(received), 2), torch.empty(sum(received), 2)
    with link.counted() as traffic:
        collectives.all_to_all_single(ours, rows, received, sent)
    predicted = collectives.predict_communication(
        "all_to_all", rows.numel(), 4, size, rank, splits=[2 * rows for rows in sent]
    )
    assert traffic.payload == predicted
    dist.all_to_all_single(theirs, rows, received, sent)
    assert torch.equal(ours, theirs)
    complex_ = torch.full((3,), complex(rank, 1))
    collectives.all_reduce(complex_)
    assert complex_[0] == complex(size * (size - 1) / 2, size)
    truth = torch.tensor([rank == 0, True])
    collectives.broadcast(truth, size - 1)
    assert truth.tolist() == [size == 1, True]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_against_torch_distributed(ranks, world_size):
    ranks.run(world_size, against_gloo, backend="link")


def bits(algorithm, dtype):
    torch.manual_seed(dist.get_rank())
    tensor = (torch.randn(1001) * 10 ** torch.linspace(-3, 3, 1001)).to(dtype)
    found = []
    for _ in range(2):
        result = tensor.clone()
        collectives.all_reduce(result, algorithm=algorithm)
        found.append(result.view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS["all_reduce"])
def test_every_rank_gets_the_same_bits_every_time(ranks, algorithm, world_size):
    for dtype in (torch.float32, torch.bfloat16):
        found = ranks.run(world_size, bits, algorithm, dtype)
        assert len({result for results in found for result in results}) == 1


def in_groups():
    """Two groups of a 2 by 2 mesh, with ranks in neither order."""
    rank = dist.get_rank()
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [3, 2])]
    group = rows[rank // 2]
    members = dist.get_process_group_ranks(group)
    value = torch.tensor([float(rank)])
    collectives.all_reduce(value, group=group)
    assert value.item() == sum(members)
    value = torch.tensor([float(rank)])
    collectives.broadcast(value, members[1], group=group)
    assert value.item() == members[1]
    output = torch.empty(2)
    collectives.all_gather_into_tensor(output, torch.tensor([float(rank)]), group=group)
    assert output.tolist() == members
    with pytest.raises(ValueError, match="root 9 is not one of the group's ranks"):
        collectives.broadcast(value, 9, group=group)
    if rank >= 2:
        with pytest.raises(ValueError, match="not in the group"):
            collectives.all_reduce(value, group=rows[0])


def test_subgroups(ranks):
    ranks.run(4, in_groups)


def in_flight(latency):
    """Several asynchronous collectives on two groups beside synchronous ones, waited for backwards."""
    rank, size = dist.get_rank(), dist.get_world_size()
    slow = link.wrap("gloo", latency)
    groups = [dist.new_group(backend=slow), dist.new_group(backend=slow)]
    tensors = [torch.full((10,), float(rank + number)) for number in range(6)]
    handles = []
    start = time.perf_counter()
    for number, tensor in enumerate(tensors):
        group = groups[number % 2]
        handles.append(collectives.all_reduce(tensor, group=group, async_op=True, algorithm="ring"))
    issued = time.perf_counter() - start
    done_early = handles[-1].is_completed()
    meanwhile = torch.ones(3)
    time.sleep(0.03 * rank)  # the ranks are in the midst of different rounds when the next call begins
    collectives.all_reduce(meanwhile, group=groups[0])
    for handle in reversed(handles):
        handle.wait()
        assert handle.is_completed()
    for number, tensor in enumerate(tensors):
        assert tensor.tolist() == [size * (size - 1) / 2 + size * number] * 10
    assert meanwhile.tolist() == [size] * 3
    return issued, done_early


def test_several_in_flight(ranks):
    for issued, done_early in ranks.run(3, in_flight, 0.02, backend="link"):
        assert issued < 0.1
        assert not done_early


def hidden(latency, compute):
    """Seconds waited for a collective that runs beside ``compute`` seconds of something else."""
    group, value = dist.new_group(backend=link.wrap("gloo", latency)), torch.ones(10)
    with link.counted() as traffic:
        handle = collectives.all_reduce(value, group=group, async_op=True, checked=False, algorithm="ring")
        time.sleep(compute)
        handle.wait()
    return traffic.waited_seconds


@pytest.mark.alone
def test_what_is_hidden_was_not_waited_for(ranks):
    for compute, exposed in ((0.0, 0.2), (0.12, 0.08), (0.3, 0.0)):  # a ring of two takes 2 latencies
        for waited in ranks.run(2, hidden, 0.1, compute, backend="link"):
            assert exposed - 0.02 <= waited < exposed + 0.08, compute


def timed(name, size, latency, per_byte, algorithm):
    group = dist.new_group(backend=link.wrap("gloo", latency, per_byte))
    run = getattr(collectives, name)
    arguments = {
        "all_reduce": lambda: [torch.ones(size)],
        "broadcast": lambda: [torch.ones(size), 0],
        "reduce": lambda: [torch.ones(size), 0],
        "all_gather_into_tensor": lambda: [torch.ones(size), torch.ones(size // dist.get_world_size())],
    }[name]()
    seconds = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        run(*arguments, group=group, checked=False, algorithm=algorithm)
        seconds.append(time.perf_counter() - start)
    return min(seconds)  # a busy machine adds, and takes nothing away


@pytest.mark.alone
@pytest.mark.parametrize(
    ("function", "operation", "algorithm"),
    [
        ("all_reduce", "all_reduce", "ring"),
        ("all_reduce", "all_reduce", "halving_doubling"),
        ("all_reduce", "all_reduce", "tree"),
        ("broadcast", "broadcast", "tree"),
        ("broadcast", "broadcast", "scatter_all_gather"),
        ("reduce", "reduce", "reduce_scatter_gather"),
        ("all_gather_into_tensor", "all_gather", "bruck"),
        ("all_gather_into_tensor", "all_gather", "ring"),
    ],
)
def test_a_collective_takes_what_it_costs(ranks, function, operation, algorithm):
    size, latency, per_byte, world_size = 1000, 0.005, 5e-6, 4
    found = ranks.run(world_size, timed, function, size, latency, per_byte, algorithm, backend="link")
    predicted = costs.cost(operation, size * 4, world_size, latency, per_byte, algorithm)
    assert predicted * 0.95 < max(found) < predicted + 0.03, (max(found), predicted)


def test_costs_and_choices():
    latency, per_byte = 1e-4, 1e-9
    for world_size in (1, 2, 3, 4, 8, 13, 64):
        for operation, algorithms in ALGORITHMS.items():
            for size in (0, 1e3, 1e9):
                found = {
                    name: costs.cost(operation, size, world_size, latency, per_byte, name)
                    for name in algorithms
                }
                chosen = costs.choose(operation, size, world_size, latency, per_byte)
                assert (
                    found[chosen]
                    == min(found.values())
                    == costs.cost(operation, size, world_size, latency, per_byte)
                )
                assert world_size > 1 or set(found.values()) == {0.0}
        optimum = 2 * (world_size - 1) / world_size * 1e9 * per_byte  # Patarasuk and Yuan, theorem 1
        assert costs.cost("all_reduce", 1e9, world_size, 0.0, per_byte) == pytest.approx(optimum)
    assert costs.choose("all_reduce", 100, 13, latency, per_byte) == "halving_doubling"
    assert costs.choose("all_reduce", 1e9, 3, latency, per_byte) == "ring"
    assert costs.choose("all_reduce", 1e6, 64, latency, per_byte) == "halving_doubling"
    assert costs.choose("broadcast", 100, 8, latency, per_byte) == "tree"
    assert costs.choose("broadcast", 1e9, 8, latency, per_byte) == "scatter_all_gather"
    with pytest.raises(ValueError, match="no collective 'all_reduse'; there are broadcast, reduce"):
        costs.choose("all_reduse", 1, 2)
    with pytest.raises(ValueError, match=r"all_reduce has no algorithm 'rign'; it has \['ring'"):
        costs.cost("all_reduce", 1, 2, algorithm="rign")


def shapes_that_differ(rank):
    return lambda: collectives.all_reduce(torch.ones(5 + (rank == 1)))


def dtypes_that_differ(rank):
    return lambda: collectives.broadcast(torch.ones(5, dtype=torch.float64 if rank == 1 else torch.float32))


def operations_that_differ(rank):
    return lambda: (collectives.broadcast if rank == 1 else collectives.all_reduce)(torch.ones(5))


def roots_that_differ(rank):
    return lambda: collectives.reduce(torch.ones(5), int(rank == 1))


def reductions_that_differ(rank):
    return lambda: collectives.all_reduce(
        torch.ones(5), dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM
    )


def algorithms_that_differ(rank):
    return lambda: collectives.all_reduce(torch.ones(5), algorithm="tree" if rank == 1 else "ring")


def output_too_small(rank):
    return lambda: collectives.all_gather_into_tensor(torch.empty(9 - 2 * (rank == 1)), torch.ones(3))


def rows_do_not_divide(rank):
    return lambda: collectives.all_to_all_single(torch.empty(6), torch.ones(6 + (rank == 1)))


def splits_do_not_match(rank):
    splits = [1, 1, 2] if rank == 1 else [2, 1, 1]
    return lambda: collectives.all_to_all_single(torch.empty(4), torch.ones(4), [2, 1, 1], splits)


def rows_of_other_width(rank):
    width = 3 if rank == 1 else 2
    return lambda: collectives.all_to_all_single(torch.empty(3, width), torch.ones(3, width))


def list_on_the_wrong_rank(rank):
    return lambda: collectives.gather(torch.ones(2), [torch.ones(2)] * 3 if rank != 2 else None)


def asynchronous(rank):
    return lambda: collectives.all_reduce(torch.ones(5 + (rank == 1)), async_op=True).wait()


def average_of_integers(rank):
    return lambda: collectives.all_reduce(torch.ones(5, dtype=torch.int64), dist.ReduceOp.AVG)


WRONG = {
    shapes_that_differ: [
        "elements must be the same on all ranks of the group, not 5 on rank 0, 2; 6 on rank 1"
    ]
    * 3,
    dtypes_that_differ: [
        "dtype must be the same on all ranks of the group, not float32 on rank 0, 2; float64 on"
    ]
    * 3,
    operations_that_differ: ["operation must be the same on all .* not all_reduce on rank 0, 2; broadcast on"]
    * 3,
    roots_that_differ: ["root must be the same on all ranks of the group, not 0 on rank 0, 2; 1 on rank 1"]
    * 3,
    reductions_that_differ: ["reduction must be the same on all .* not SUM on rank 0, 2; MAX on rank 1"] * 3,
    algorithms_that_differ: ["algorithm must be the same on all .* not ring on rank 0, 2; tree on rank 1"]
    * 3,
    output_too_small: [
        "rank 1 was called with wrong arguments",
        "output_tensor has 7 elements; with 3 in input_tensor and 3 ranks it must have 9",
        "rank 1 was called with wrong arguments",
    ],
    rows_do_not_divide: [
        "rank 1 was called with wrong arguments",
        "7 rows of input do not divide by 3 ranks",
        "rank 1 was called with wrong arguments",
    ],
    splits_do_not_match: [
        "rank 1 sends 1 rows to rank 0, which expects 1|rank [01] sends . rows to rank ., which"
    ]
    * 3,
    rows_of_other_width: [r"rows must be as wide on all ranks, not \[2, 3\] elements"] * 3,
    list_on_the_wrong_rank: [
        "rank 1 was called with wrong arguments",
        "gather_list is given, but only the root",
        "rank 1 was called with wrong arguments",
    ],
    asynchronous: ["elements must be the same on all ranks of the group, not 5 on rank 0, 2; 6 on rank 1"]
    * 3,
    average_of_integers: ["AVG needs a floating-point dtype, not torch.int64"] * 3,
}


def go_wrong(names):
    """[(the message, seconds)] of each; and a collective afterwards."""
    rank, found = dist.get_rank(), []
    for name in names:
        call = globals()[name](rank)
        start = time.perf_counter()
        with pytest.raises(ValueError) as caught:
            call()
        found.append((str(caught.value), time.perf_counter() - start))
    value = torch.ones(2)
    collectives.all_reduce(value)
    assert value.tolist() == [dist.get_world_size()] * 2
    return found


def test_wrong_arguments_are_named_on_all_ranks_at_once(ranks):
    answers = ranks.run(3, go_wrong, [case.__name__ for case in WRONG])
    for number, (case, texts) in enumerate(WRONG.items()):
        for rank, text in enumerate(texts):
            message, seconds = answers[rank][number]
            assert re.search(text, message), (case, message)
            assert seconds < 5, case


def absent():
    group = dist.new_group(timeout=timedelta(seconds=1))
    answer = None
    if dist.get_rank():
        start = time.perf_counter()
        with pytest.raises(RuntimeError) as caught:
            collectives.all_reduce(torch.ones(5), group=group)
        answer = str(caught.value), time.perf_counter() - start
    dist.barrier()
    return answer


def test_a_rank_that_does_not_come_is_named(ranks):
    message, seconds = ranks.run(2, absent)[1]
    assert "all_reduce: rank 1 of 2 waited in vain for rank 0" in message
    assert seconds < 5


def test_the_signatures_are_torch_distributeds():
    for name in collectives.__all__:
        if theirs := getattr(dist, name, None):
            ours = inspect.signature(getattr(collectives, name)).parameters.values()
            names = [p.name for p in inspect.signature(theirs).parameters.values()]
            assert [p.name for p in ours if p.kind != p.KEYWORD_ONLY] == [
                other for other in names if other not in ("group_src", "group_dst")
            ], name
