"""The collectives lab's formulas: each way's parts, by hand."""

from dataclasses import replace

import pytest
from stated import FLAT, linked

from labs.collectives import model
from labs.machine import Curve


def test_the_ring_by_hand_and_the_crowd_of_four_on_two_cores():
    size, copying = 2**20, 1 / 16e9
    value, because = model.seconds(linked(), "all_gather", "gloo", size, 2)
    assert value == pytest.approx(2 * 25e-6 + 2e-4 + size / 2 * 8e-10 + 4 * size * copying)
    assert "200 us + 0.8 ns/B an exchange" in because
    value, because = model.seconds(linked(), "all_gather", "ours", size, 2)
    assert value == pytest.approx(23 * 2e-6 + 2e-4 + size / 2 * 8e-10 + size * copying)
    assert "ring of 1048576 B on 2 ranks, 23 torch calls of 2.0 us" in because
    alone, _ = model.seconds(linked(cores=4.0), "all_gather", "gloo", 2**20, 4)
    crowded, because = model.seconds(linked(), "all_gather", "gloo", 2**20, 4)
    assert crowded == pytest.approx(2 * alone)
    assert "4 ranks on 2 cores" in because


def test_through_shared_memory_all_ranks_bytes_pass_at_the_rate_beyond_a_cores_caches():
    slow = replace(
        linked(), curves={"copy_all": Curve((1e6, 4e6, 5e6), (80e9, 80e9, 20e9))} | {"copy_1": FLAT}
    )
    small, because = model.seconds(slow, "broadcast", "shm", 2**10, 2)
    assert small == pytest.approx(20e-6 + 4 * 2**10 / 80e9), "twice the caches of two cores: 4 MB"
    assert because == "20 torch calls + 4.1e+03 B at 80.0 GB/s"
    large, _ = model.seconds(slow, "all_reduce", "shm", 2**20, 3)
    assert large == pytest.approx(1.5 * (52e-6 + 14 * 2**20 / 20e9) + 2 * 2**20 / 16e9)


@pytest.mark.parametrize(
    ("ranks", "size", "calls", "moved"),
    [
        (2, 2**20, 8, 10 * 2**20),  # two copied in (2 x 2), two sums of two (2 x 3)
        (3, 2**16, 8, 18 * 2**16),  # three copied in (3 x 2), three sums of three (3 x 4)
        (3, 2**17, 52, 14 * 2**17),  # two thirds of each in (4), the sums (4), parts in (2), out (4)
        (4, 2**20, 52, 19 * 2**20),  # three quarters of each in (6), the sums (5), parts in (2), out (6)
    ],
)
def test_three_ranks_and_more_sum_a_part_each_of_long_vectors(ranks, size, calls, moved):
    found, because = model.seconds(linked(cores=8.0), "all_reduce", "shm", size, ranks)
    assert found == pytest.approx(calls * 1e-6 + moved / 16e9 + 2 * size / 16e9)
    assert because.startswith(f"{calls} torch calls")


@pytest.mark.parametrize(
    ("operation", "moved"),
    [
        ("broadcast", 8),  # in once (2), out by three ranks (3 x 2)
        ("scatter", 3.5),  # three quarters in (1.5) and out (1.5), the root's own across (0.5)
        ("gather", 4),  # four quarters in (2), and out at the root (2)
        ("reduce", 13),  # four in (4 x 2), one sum of four (5)
        ("all_gather", 10),  # four quarters in (2), out at each rank (4 x 2)
        ("reduce_scatter", 11),  # three quarters of each in (4 x 1.5), four sums of a quarter (4 x 1.25)
        ("all_to_all", 14),  # three quarters of each in (4 x 1.5), four quarters to each out (4 x 2)
    ],
)
def test_what_four_ranks_move_through_shared_memory(operation, moved):
    size, host = 2**20, linked(cores=8.0)
    found, _ = model.seconds(host, operation, "shm", size, 4)
    nothing, _ = model.seconds(host, operation, "shm", 0, 4)
    refilled = 2 if operation == "reduce" else 0
    assert found - nothing == pytest.approx((moved + refilled) * size / 16e9)


def test_of_ours_trees_are_messages_and_rings_exchanges():
    """What is added to two all-reduces of 1 MiB but messages: refilling, the sum, and Python."""
    size, copying = 2**20, 1 / 16e9
    found = {
        name: model.seconds(linked(), "all_reduce", f"ours_{name}", size, 2)[0] for name in ("tree", "ring")
    }
    both = 2 * size * copying + 28 * 2e-6
    assert found["tree"] - both == pytest.approx(2 * (1e-4 + size * 5e-10) + 3 * size * copying)
    assert found["ring"] - both == pytest.approx(2 * (2e-4 + size / 2 * 8e-10) + 3 / 2 * size * copying)
    long = 2**26  # of which a broadcast scatters, and gathers what was scattered
    value, because = model.seconds(linked(cores=8.0), "broadcast", "ours", long, 8)
    scatter, gather = 3 * 1e-4 + 7 / 8 * long * 5e-10, 7 * 2e-4 + 7 / 8 * long * 8e-10
    assert value == pytest.approx((18 + 5 * 10) * 2e-6 + scatter + gather)
    assert because.startswith("scatter_all_gather of 67108864 B on 8 ranks")


@pytest.mark.parametrize(
    ("operation", "algorithm", "ranks", "moved"),
    [
        ("all_reduce", "tree", 3, 6),  # the root adds two (2 x 3)
        ("all_reduce", "tree", 4, 8),  # one below the root clones (2), and adds; the root adds two (2 x 3)
        ("all_reduce", "ring", 4, 9 / 4),  # three quarters are added
        ("all_reduce", "halving_doubling", 3, 9 / 2),  # a whole is added, then a half
        ("reduce", "tree", 4, 8),
        ("reduce", "reduce_scatter_gather", 4, 17 / 4),  # a clone (2), three quarters added
        ("all_gather", "ring", 4, 1 / 2),  # the own quarter is put in place
        ("all_gather", "bruck", 4, 9 / 2),  # so it is, then all are put in order (2) and copied out (2)
        ("reduce_scatter", "ring", 4, 19 / 4),  # a copy (2), three quarters added, a quarter out
        ("broadcast", "tree", 4, 0),
    ],
)
def test_what_ranks_of_ours_move_in_a_row(operation, algorithm, ranks, moved):
    size, host = 2**20, linked(cores=8.0)
    found, _ = model.seconds(host, operation, f"ours_{algorithm}", size, ranks)
    # At twice the rate only what is moved in memory takes half as long, and a refill.
    faster = Curve((1e6, 2e6), (32e9, 32e9))
    fast, _ = model.seconds(
        replace(host, curves=dict.fromkeys(host.curves, faster)), operation, f"ours_{algorithm}", size, ranks
    )
    refilled = 2 if operation in model.IN_PLACE else 0
    assert 2 * (found - fast) == pytest.approx((moved + refilled) * size / 16e9)
