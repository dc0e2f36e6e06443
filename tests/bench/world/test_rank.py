"""A rank goes on after what fails in it. Played in this process: a world of one rank and its controller."""

import threading

import pytest
import torch.distributed as dist

from bench.world import protocol
from bench.world.controller import World
from bench.world.rank import serve
from bench.world.steps import WorldStep


@pytest.fixture
def world(beside_world_job, monkeypatch):
    store = protocol.open_store()
    monkeypatch.setenv(protocol.ADDRESS, protocol.address_of(store.port, 1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    thread = threading.Thread(target=serve, args=[protocol.connect("127.0.0.1", store.port)], daemon=True)
    thread.start()
    yield World(1, answer_seconds=10.0)
    protocol.send(store, "stop")
    thread.join(10)
    assert not thread.is_alive()
    dist.destroy_process_group()


def test_an_output_that_cannot_be_sent_is_an_error_of_the_call(world):
    step = WorldStep(world, "", {}, "world_job:unsendable")
    with pytest.raises(RuntimeError, match=r"rank 0 of 1: the output of 'call' cannot be sent: .*lambda"):
        step()
    assert step.sample(1) > 0
    step.close()


def test_nothing_is_left_of_a_step_once_it_is_closed(world):
    step = WorldStep(world, "", {}, "world_job:Closable")
    assert step() is False
    step.close()
    step.close()
    with pytest.raises(RuntimeError, match="KeyError"):
        step()
