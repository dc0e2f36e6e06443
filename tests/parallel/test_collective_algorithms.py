"""The algorithms without processes: any number of ranks in lock step, on a link with a clock of its own."""

from collections import defaultdict, deque

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from parallel import collective_costs as costs
from parallel import collective_rings as rings
from parallel import collective_trees as trees
from parallel.collective_bytes import predict_communication
from parallel.point_to_point import Send, bruck_all_gather
from parallel.reductions import combiner

ADD = combiner(torch.distributed.ReduceOp.SUM)


def play(algorithms, latency=0.0, seconds_per_byte=0.0):
    """Run all ranks' rounds to the end. ({rank: bytes sent}, time of the last).

    A rank's messages of a round leave one after another, and arrive one after another; a deadlock, and a
    message that nobody receives or that has another size than its buffer, is an error.
    """
    size = len(algorithms)
    wire = defaultdict(deque)  # (from, to) -> [(tensor, arrives)]
    now, sent = [0.0] * size, [0] * size
    waiting, running = [None] * size, set(range(size))
    while running:
        moved = False
        for rank in sorted(running):
            if waiting[rank] is None:
                messages = next(algorithms[rank], None)
                moved = True
                if messages is None:
                    running.discard(rank)
                    continue
                leaves = now[rank]
                for message in messages:
                    if isinstance(message, Send) and message.tensor.numel():
                        assert message.peer != rank
                        bytes_ = message.tensor.numel() * message.tensor.element_size()
                        leaves += latency + bytes_ * seconds_per_byte
                        sent[rank] += bytes_
                        wire[rank, message.peer].append((message.tensor.clone(), leaves))
                waiting[rank] = [m for m in messages if not isinstance(m, Send) and m.tensor.numel()], leaves
            receives, end = waiting[rank]
            if all(wire[m.peer, rank] for m in receives):
                free = now[rank]
                for message in receives:
                    data, arrives = wire[message.peer, rank].popleft()
                    assert data.shape == message.tensor.shape
                    bytes_ = data.numel() * data.element_size()
                    free = max(arrives, free + latency + bytes_ * seconds_per_byte)
                    message.tensor.copy_(data)
                now[rank], waiting[rank], moved = max(end, free), None, True
        assert moved, f"deadlock: {waiting}"
    assert not any(wire.values()), "messages that nobody receives"
    return dict(enumerate(sent)), max(now)


def vectors(size, count):
    return [torch.arange(count, dtype=torch.float64) * (rank + 1) + rank for rank in range(size)]


def all_reduces(size, count, root):
    data = vectors(size, count)
    total = torch.stack(data).sum(0)
    for name, run in (
        ("ring", rings.all_reduce),
        ("halving_doubling", rings.halving_doubling_all_reduce),
        ("tree", trees.all_reduce),
    ):
        flats = [vector.clone() for vector in data]
        yield "all_reduce", name, [run(flats[r], ADD, r, size) for r in range(size)], flats, [total] * size
    for name, run in (("tree", trees.reduce), ("reduce_scatter_gather", rings.reduce_scatter_gather_reduce)):
        flats = [vector.clone() for vector in data]
        runs = [trees.shifted(run(flats[r], ADD, (r - root) % size, size), root, size) for r in range(size)]
        yield "reduce", name, runs, flats, [total if r == root else data[r] for r in range(size)]


def broadcasts(size, count, root):
    data = vectors(size, count)
    for name, run in (("tree", trees.broadcast), ("scatter_all_gather", rings.scatter_all_gather_broadcast)):
        flats = [vector.clone() for vector in data]
        runs = [trees.shifted(run(flats[r], (r - root) % size, size), root, size) for r in range(size)]
        yield "broadcast", name, runs, flats, [data[root]] * size
    whole = torch.arange(count, dtype=torch.float64)
    edges = rings.bounds(count, size)
    windows = [whole[edges[p] : edges[p + trees.subtree(p, size)]] for p in range(size)]
    held = [whole.clone() if p == 0 else torch.empty_like(windows[p]) for p in range(size)]
    yield "scatter", "tree", [trees.scatter(held[p], edges, p, size) for p in range(size)], held, windows
    held = [torch.zeros_like(window) for window in windows]
    for place, mine in enumerate(held):
        mine[: edges[place + 1] - edges[place]] = whole[edges[place] : edges[place + 1]]
    yield "gather", "tree", [trees.gather(held[p], edges, p, size) for p in range(size)], held, windows


def gathers(size, count, root):
    whole = torch.arange(count, dtype=torch.float64)
    flats = [torch.zeros_like(whole) for _ in range(size)]
    for rank, flat in enumerate(flats):
        rings.chunks(flat, size)[rank].copy_(rings.chunks(whole, size)[rank])
    runs = [rings.all_gather(rings.chunks(flat, size), rank) for rank, flat in enumerate(flats)]
    yield "all_gather", "ring", runs, flats, [whole] * size
    data = vectors(size, count)
    flats = [vector.clone() for vector in data]
    total = torch.stack(data).sum(0)
    runs = [rings.reduce_scatter(rings.chunks(flat, size), ADD, rank) for rank, flat in enumerate(flats)]
    found = [rings.chunks(flat, size)[rank] for rank, flat in enumerate(flats)]
    yield "reduce_scatter", "ring", runs, found, rings.chunks(total, size)


def every_algorithm(size, count, root):
    for family in (all_reduces, broadcasts, gathers):
        yield from family(size, count, root)


@given(size=st.integers(1, 17), count=st.integers(0, 70), root=st.integers(0, 16))
def test_any_number_of_ranks_and_elements(size, count, root):
    root %= size
    for operation, algorithm, runs, found, right in every_algorithm(size, count, root):
        sent, _ = play(runs)
        for rank in range(size):
            assert torch.equal(found[rank], right[rank]), (operation, algorithm, rank)
            place = root if operation in ("broadcast", "reduce") else 0
            predicted = predict_communication(
                operation, count, 8, size, rank, root=place, algorithm=algorithm, checked=False
            )
            assert sent[rank] == predicted.get("send", 0), (operation, algorithm, rank)


@given(size=st.integers(1, 17), count=st.integers(0, 5))
def test_bruck_and_all_to_all(size, count):
    for rank_blocks in [[torch.full((size, count), float(rank)) for rank in range(size)]]:
        sent, seconds = play([bruck_all_gather(rank_blocks[rank], rank) for rank in range(size)], latency=1.0)
        assert seconds == (costs.rounds(size) if count else 0)
        for rank in range(size):
            assert rank_blocks[rank].roll(rank, 0).tolist() == [[float(r)] * count for r in range(size)]
            assert sent[rank] == (size - 1) * count * 4
    pieces = [
        [torch.full((count + to,), float(rank * size + to)) for to in range(size)] for rank in range(size)
    ]
    places = [[torch.empty(count + rank) for _ in range(size)] for rank in range(size)]
    play([rings.all_to_all(places[rank], pieces[rank], rank) for rank in range(size)])
    for rank in range(size):
        for source in range(size):
            assert torch.equal(places[rank][source], pieces[source][rank])


@given(size=st.integers(1, 17), latency=st.sampled_from([0.0, 1.0]), per_byte=st.sampled_from([0.0, 1.0]))
def test_the_cost_is_the_time_it_takes(size, latency, per_byte):
    """For vectors that divide; trees of odd sizes take at most what the formula of full trees says."""
    power = 1 << (size.bit_length() - 1)
    count = size * power
    for operation, algorithm, runs, _, _ in every_algorithm(size, count, 0):
        _, seconds = play(runs, latency, per_byte)
        predicted = costs.cost(operation, 8 * count, size, latency, per_byte, algorithm)
        assert seconds <= predicted * (1 + 1e-12), (operation, algorithm)
        if size == power:
            assert seconds == pytest.approx(predicted), (operation, algorithm)


@given(size=st.integers(1, 100))
def test_every_place_hangs_once_in_the_tree(size):
    seen = [child for place in range(size) for child in trees.children(place, size)]
    assert sorted(seen) == list(range(1, size))
    for place in range(size):
        below = trees.children(place, size)
        assert all(trees.parent(child) == place for child in below)
        assert trees.subtree(place, size) == 1 + sum(trees.subtree(child, size) for child in below)
