"""Ranks join by name, a rank that dies is an error on the others, and torchrun's restart recovers."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import elastic, liveness

WORKER = Path(__file__).with_name("elastic_worker.py")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


def joined(port, rank, world_size, body, join_timeout, form="gloo", **environment):
    """What ``body`` returns in a world joined as ``rank``, or the error, with the seconds from the joining
    on."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **environment,
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    began = time.monotonic()
    try:
        with elastic.join(form, timeout=120, join_timeout=join_timeout) as world:
            began = time.monotonic()
            answer = body(world)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    else:
        return answer
    finally:
        assert not dist.is_initialized()
        for name in values:
            os.environ.pop(name, None)


def claimed(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def summed(world):
    value = torch.tensor([float(world.rank + 1)])
    dist.all_reduce(value)
    return value.item(), world.rank, world.world_size, world.local_rank


def join_twice(folder, world_size, ports):
    rank = next(r for r in range(8) if claimed(Path(folder) / str(r)))
    return [joined(port, rank, world_size, summed, 20.0, LOCAL_RANK=rank) for port in ports]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_world_joins_and_leaves_twice(ranks, tmp_path, port, world_size):
    """On the same port too: nothing of the first world is in the way of the second."""
    found = ranks.run(world_size, join_twice, str(tmp_path), world_size, [port, port], backend=None)
    total = world_size * (world_size + 1) / 2
    for first, second in found:
        assert first == second == (total, first[1], world_size, first[1])
    assert sorted(first[1] for first, _ in found) == list(range(world_size))


def join_as(folder, port, environments, join_timeout):
    rank = next(r for r in range(8) if claimed(Path(folder) / str(r)))
    if rank >= len(environments):
        return None
    return joined(port, body=summed, join_timeout=join_timeout, **environments[rank])


@pytest.mark.parametrize(
    ("environments", "kind", "message"),
    [
        (
            [(0, 3), (2, 3)],
            "TimeoutError",
            r"rank 1 of 3 did not join within 1 s; there are rank 0 of 3 .*rank 2",
        ),
        (
            [(1, 2)],
            "TimeoutError",
            r"rank 0 did not come to 127.0.0.1:\d+ \(MASTER_ADDR:MASTER_PORT\) within 1 s",
        ),
        ([(0, 2), (1, 3)], "ValueError", r"WORLD_SIZE is 2 for rank 0 .* and 3 for rank 1"),
        ([(0, 3), (1, 3), (1, 3)], "ValueError", "two processes have RANK=1"),
    ],
    ids=["missing", "no rank 0", "other world size", "same rank"],
)
def test_who_does_not_fit_is_named_on_all_ranks(ranks, tmp_path, port, environments, kind, message):
    answers = ranks.run(
        len(environments),
        join_as,
        str(tmp_path),
        port,
        [{"rank": rank, "world_size": size} for rank, size in environments],
        1.0,
        backend=None,
        timeout=30,
    )
    for found, text, seconds in answers:
        assert found == kind
        assert re.search(message, text), text
        assert seconds < 10


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "2", r"RANK is an integer from 0 to 1, not '2'"),
        ("RANK", "", r"the environment lacks RANK: torchrun sets"),
        ("WORLD_SIZE", "0", r"WORLD_SIZE is an integer of at least 1, not '0'"),
        ("WORLD_SIZE", "two", r"WORLD_SIZE is an integer of at least 1, not 'two'"),
        ("MASTER_ADDR", "", r"the environment lacks MASTER_ADDR"),
        ("MASTER_PORT", "99999", r"MASTER_PORT is an integer from 1 to 65535, not '99999'"),
        ("LOCAL_RANK", "-1", r"LOCAL_RANK is an integer from 0 to 1, not '-1'"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, name, value, message):
    right = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, text in {**right, name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=message):
        elastic.join("gloo")


def join_alone():
    for name in NAMES:
        os.environ.pop(name, None)
    with elastic.join("gloo") as world:
        return summed(world)


def test_without_a_launcher_a_process_is_a_world_of_one(ranks):
    assert ranks.run(1, join_alone, backend=None) == [(1.0, 0, 1, 0)]


def waiting_in_a_collective(world):
    dist.all_reduce(torch.ones(1))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        dist.all_reduce(torch.ones(1))


def busy_elsewhere(world):
    """Rank 0 sleeps: no broken connection tells it anything."""
    dist.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stuck(world):
    """Rank 0 waits inside of C++, where no signal is looked at."""
    dist.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    liveness.GRACE_SECONDS = 0.3
    dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False).get("never")


def raising(world):
    dist.barrier()
    if world.rank == 1:
        raise ValueError("seven is not a batch")
    time.sleep(60)


def lose_a_rank(folder, port, world_size, body):
    rank = next(r for r in range(8) if claimed(Path(folder) / str(r)))
    return joined(port, rank, world_size, body, 20.0)


@pytest.mark.parametrize("body", [waiting_in_a_collective, busy_elsewhere], ids=["collective", "sleep"])
def test_a_dead_rank_is_named_on_all_others(ranks, tmp_path, port, body):
    answers = ranks.run(
        3, lose_a_rank, str(tmp_path), port, 3, body, backend=None, timeout=30, expect_death={0, 1, 2}
    )
    answers = [answer for answer in answers if answer]
    assert len(answers) == 2
    for kind, text, seconds in answers:
        assert kind == "RankLost"
        assert re.search(r"rank 1 of 3 \(process \d+ on \S+\) has died", text), text
        assert seconds < 10


def test_a_rank_that_hangs_on_a_dead_one_ends(ranks, tmp_path, port, capfd):
    began = time.monotonic()
    answers = ranks.run(
        2, lose_a_rank, str(tmp_path), port, 2, stuck, backend=None, timeout=30, expect_death={0, 1}
    )
    assert answers == [None, None]
    assert time.monotonic() - began < 10


def test_a_rank_that_raises_is_named_on_the_others(ranks, tmp_path, port):
    answers = ranks.run(2, lose_a_rank, str(tmp_path), port, 2, raising, backend=None, timeout=30)
    (own,) = [answer for answer in answers if answer[0] == "ValueError"]
    (other,) = [answer for answer in answers if answer[0] == "RankLost"]
    assert own[1] == "seven is not a batch"
    assert re.search(r"rank 1 of 2 .* raised ValueError: seven is not a batch", other[1])
    assert other[2] < 10


def losses(folder, rank):
    """[(attempt, step, loss, pid)] of the lines that are whole."""
    path = folder / f"losses-{rank}"
    text = path.read_text() if path.exists() else ""
    rows = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(int(attempt), int(step), loss, int(pid)) for attempt, step, loss, pid in rows]


class Training:
    """``torchrun --standalone --nproc-per-node 2`` of elastic_worker.py in ``folder``."""

    def __init__(self, folder, steps, every, restarts, form="gloo"):
        folder.mkdir()
        self.folder = folder
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        command += ["--max-restarts", restarts, WORKER, folder, steps, every, form]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
        environment |= {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def kill(self, rank, attempt, steps):
        """SIGKILL ``rank`` once it has made ``steps`` steps in this attempt."""
        deadline = time.monotonic() + 60
        while True:
            made = [row for row in losses(self.folder, rank) if row[0] == attempt]
            if len(made) >= steps:
                os.kill(made[-1][3], signal.SIGKILL)
                return
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.005)

    def finish(self):
        assert self.process.wait(120) == 0, self.log()

    def log(self):
        return (self.folder / "log").read_text()

    def end(self):
        """Nothing of it may be left; what is left is ended, and is a failure."""
        left = [pid for pid in processes_of(self.folder) if pid != self.process.pid]
        if self.process.poll() is None:
            left.append(self.process.pid)
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left


def processes_of(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def in_peace(folder, steps, every, form, port):
    """The same training, uninterrupted, without torchrun."""
    import elastic_worker

    rank = next(r for r in range(8) if claimed(folder / str(r)))
    return joined(
        port,
        rank,
        2,
        lambda world: elastic_worker.train(folder, steps, every, form, world, 0),
        20.0,
        form,
        LOCAL_RANK=rank,
    )


def killed_and_resumed(ranks, folder, port, kills, steps, form, every=5):
    """Trains once in peace and once with ``kills`` [(rank, after so many steps of its attempt)]; same
    losses."""
    peace = folder / "peace"
    peace.mkdir()
    ranks.run(2, in_peace, peace, steps, every, form, port, backend=None, timeout=100)
    war = Training(folder / "war", steps, every, len(kills), form)  # not before: it would be over
    try:
        for attempt, (rank, after) in enumerate(kills):
            war.kill(rank, attempt, after)
        war.finish()
        for rank in range(2):
            expected = {step: loss for _, step, loss, _ in losses(peace, rank)}
            assert list(expected) == list(range(1, steps + 1))
            rows = losses(war.folder, rank)
            assert {step: loss for _, step, loss, _ in rows} == expected
            assert all(loss == expected[step] for _, step, loss, _ in rows)  # also those made twice
            for attempt in range(1, len(kills) + 1):
                before = [step for tried, step, _, _ in rows if tried < attempt]
                resumed = min(step for tried, step, _, _ in rows if tried == attempt)
                assert resumed > max(before) - every - 1, f"attempt {attempt} began with step {resumed}"
        assert max(attempt for attempt, *_ in losses(war.folder, 0)) == len(kills)  # no restart was lost
    finally:
        left = war.end()
    assert left == []


@pytest.mark.proof  # tests/labs/test_train.py kills a rank of the real training once
@pytest.mark.parametrize("form", ["gloo", "shm"])
def test_torchrun_recovers_from_a_kill(ranks, tmp_path, port, form):
    """Of whole models over gloo, and of sharded ones over shared memory."""
    killed_and_resumed(ranks, tmp_path, port, [(1, 7)], 20, form)


@pytest.mark.proof
def test_workers_end_when_torchrun_is_killed(tmp_path):
    """SIGKILL of the agent: it can end nobody any more, so they end themselves."""
    training = Training(tmp_path / "run", 100000, 1000, 0)
    try:
        deadline = time.monotonic() + 60
        while len(losses(training.folder, 0)) < 3:
            assert time.monotonic() < deadline, training.log()
            time.sleep(0.02)
        training.process.kill()
        training.process.wait()
        killed = time.monotonic()
        while processes_of(training.folder) and time.monotonic() < killed + 10:
            time.sleep(0.05)
        assert processes_of(training.folder) == []
        assert re.search(r"RankLost: torchrun \(process \d+\) has ended", training.log())
    finally:
        training.end()


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", ["gloo", "shm"])
def test_torchrun_recovers_from_twenty_kills(ranks, tmp_path, port, form):
    chance = random.Random(0)
    kills = [(chance.randrange(2), chance.randint(1, 15)) for _ in range(20)]
    killed_and_resumed(ranks, tmp_path, port, kills, 360, form)
