"""Ranks played by a thread, for what ranks say and when; and the folder where world_job.py stands."""

import threading

import pytest

from bench.world import protocol


class Played:
    """Ranks of a world that a thread plays: they answer an operation, or "operation address", as
    ``answers[operation][rank]`` says (None: not at all), else well. ``seen``: the operations that came."""

    def __init__(self, size):
        self.store = protocol.open_store()
        self.address = protocol.address_of(self.store.port, size)
        self.answers, self.seen, self._size = {}, [], size
        self._thread = threading.Thread(target=self._serve, args=[self.store.port], daemon=True)
        self._thread.start()

    def _serve(self, port):
        store, number, operation = protocol.connect("127.0.0.1", port), 0, ""
        while operation != "stop":
            number += 1
            operation, content = protocol.received(store, number)
            self.seen.append(operation)
            told = self.answers.get(f"{operation} {content.get('address')}", self.answers.get(operation, {}))
            for rank in range(self._size):
                well = {"recorded": {}, "texts": {}, "output": 1.0, "seconds": 0.02}
                answer = told.get(rank, well)
                if answer is not None:
                    protocol.answer(store, number, rank, answer)

    def stop(self):
        if self._thread.is_alive():
            protocol.send(self.store, "stop")
            self._thread.join(10)


@pytest.fixture
def played(monkeypatch):
    ranks = Played(2)
    monkeypatch.setenv(protocol.ADDRESS, ranks.address)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def beside_world_job():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(__file__.rsplit("/", 1)[0])
        yield
