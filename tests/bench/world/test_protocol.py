"""What controller and ranks say to each other."""

from bench.world import protocol


def test_an_address_holds_host_port_and_size(monkeypatch):
    assert protocol.parse(protocol.address_of(1234, 4)) == ("127.0.0.1", 1234, 4)
    monkeypatch.setenv(protocol.ADDRESS, protocol.address_of(1234, 4))
    assert protocol.joined_size() == 4
    monkeypatch.delenv(protocol.ADDRESS)
    assert protocol.joined_size() == 0


def test_what_a_launcher_tells_its_ranks_is_left_out():
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert protocol.without_launcher({**ranks, "HOME": "/"}) == {"HOME": "/"}


def test_a_rank_gives_up_on_another_before_the_controller_does():
    assert protocol.COLLECTIVE_SECONDS + protocol.GRACE_SECONDS < protocol.ANSWER_SECONDS


def test_commands_are_numbered_and_an_answer_is_taken_once():
    store = protocol.open_store()
    assert protocol.send(store, "call", address="a/b") == 1
    assert protocol.send(store, "stop") == 2
    assert protocol.received(store, 1) == ("call", {"address": "a/b"})
    protocol.answer(store, 1, 3, {"output": 1.0})
    assert protocol.answered(store, 1, 3) == {"output": 1.0}
    assert not store.check([protocol.answer_key(1, 3)])
