"""The pool of ranks that the other tests stand on."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed

import parallel.shm  # noqa: F401  registers it


def summed():
    value = torch.full((3,), float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.tolist(), os.getpid()


def wrong_on_one():
    if dist.get_rank() == 1:
        raise ValueError("rank one objects")


def killed_on_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def late_on_one():
    if dist.get_rank() == 1:
        time.sleep(60)


def fails_to_join(folder):
    store = dist.FileStore(f"{folder}/store", 2)
    with pytest.raises(dist.DistBackendError, match="to join"):
        dist.init_process_group("shm", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.1))


def test_worlds_of_every_size_share_their_processes(ranks):
    before = {}
    for world_size in (1, 2, 3, 4, 2):
        found = ranks.run(world_size, summed)
        total = world_size * (world_size + 1) / 2
        assert [values for values, _ in found] == [[total] * 3] * world_size
        for rank, (_, process) in enumerate(found):
            assert before.setdefault(rank, process) == process


def test_what_a_rank_raises_raises_here_with_its_rank(ranks):
    with pytest.raises(RankFailed, match=r"rank 1 of 2: ValueError: rank one objects"):
        ranks.run(2, wrong_on_one)
    assert ranks.run(2, summed)[0][0] == [3.0] * 3


def test_a_rank_whose_own_group_failed_finds_the_others_again(ranks, tmp_path):
    ranks.run(2, summed)
    ranks.run(1, fails_to_join, str(tmp_path), backend=None)
    assert ranks.run(2, summed, timeout=10.0)[0][0] == [3.0] * 3


def test_a_dead_rank_is_named_and_replaced(ranks):
    with pytest.raises(RankFailed, match="rank 1 of 2 ended with -9"):
        ranks.run(2, killed_on_one)
    assert ranks.run(2, killed_on_one, expect_death={1}) == ["alive", None]
    assert ranks.run(2, summed)[0][0] == [3.0] * 3


def test_a_late_rank_is_named_with_what_it_does(ranks):
    with pytest.raises(TimeoutError, match=r"no answer from ranks \[1\] of 2 within 1 s") as found:
        ranks.run(2, late_on_one, timeout=1.0)
    assert "in late_on_one" in str(found.value)
    assert ranks.run(2, summed)[0][0] == [3.0] * 3
