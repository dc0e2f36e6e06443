"""The shared-memory backend when ranks differ, wait, die or leave: named errors, and nothing left behind."""

import contextlib
import gc
import os
import signal
import stat
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel.shm  # noqa: F401 (registers the backend)

# --- errors -------------------------------------------------------------------------------------------


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def disagreements():
    rank, size = dist.get_rank(), dist.get_world_size()
    last = size - 1
    found = [
        raised(ValueError, lambda: dist.all_reduce(torch.ones(5 if rank == last else 4))),
        raised(ValueError, lambda: dist.all_reduce(torch.ones(4).to(torch.int32 if rank else torch.int64))),
        raised(ValueError, lambda: dist.broadcast(torch.ones(300_000), rank % 2)),
        raised(ValueError, lambda: dist.barrier() if rank else dist.all_reduce(torch.ones(4))),
        raised(ValueError, lambda: dist.all_reduce(torch.ones(200_000 + rank), async_op=True).wait()),
        raised(
            ValueError,
            lambda: dist.all_to_all_single(
                torch.ones(2 * size + rank), torch.ones(2 * size), [2] * (size - 1) + [2 + rank]
            ),
        ),
    ]
    if rank == 0:
        dist.send(torch.ones(3), 1)
    if rank == 1:
        found.append(raised(ValueError, lambda: dist.recv(torch.ones(4), 0)))
    x = torch.ones(100)  # the group can still be used
    dist.all_reduce(x)
    assert (x == size).all()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_disagree_get_the_same_named_error(ranks, world_size):
    found = ranks.run(world_size, disagreements, backend="shm")
    message = found[1].pop()
    assert "rank 0 has sent 3 float32 (tag 0), rank 1 receives 4 float32" in message
    assert all(texts == found[0] for texts in found)
    sizes, dtypes, roots, operations, large, splits = found[0]
    assert "all_reduce SUM of 4 float32" in sizes
    assert f"rank {world_size - 1}: all_reduce SUM of 5" in sizes
    assert "rank 0: all_reduce SUM of 4 int64" in dtypes
    assert "4 int32" in dtypes
    assert "from rank 0" in roots
    assert "from rank 1" in roots
    assert "rank 0: all_reduce" in operations
    assert "barrier" in operations
    assert "rank 0: all_reduce SUM of 200000 float32" in large
    assert "200001" in large
    assert f"rank {world_size - 1} sends 2 elements to rank 1, which expects 3" in splits


def wrong_arguments():
    group = dist.group.WORLD
    return [
        raised(ValueError, lambda: dist.all_gather_into_tensor(torch.empty(5), torch.empty(2))),
        raised(ValueError, lambda: dist.all_gather([torch.empty(1)] * 3, torch.empty(1))),
        raised(ValueError, lambda: dist.all_to_all_single(torch.empty(3), torch.empty(3))),
        raised(ValueError, lambda: dist.all_reduce(torch.empty(3, device="meta"))),
        raised(TypeError, lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND)),
        raised(ValueError, lambda: group.send([torch.ones(3)], dist.get_rank(), 0)),
    ]


def test_wrong_arguments_are_named_at_once(ranks):
    found = ranks.run(2, wrong_arguments, backend="shm")[0]
    assert "it must have 4 float32" in found[0]
    assert "takes 2 output tensors, not 3" in found[1]
    assert "needs input_split_sizes" in found[2]
    assert "not of meta" in found[3]
    assert "BAND on integers" in found[4]
    assert "itself" in found[5]


IN_VAIN = {
    "all_reduce": lambda group: dist.all_reduce(torch.ones(4), group=group),
    "large": lambda group: dist.all_reduce(torch.ones(400_000), group=group, async_op=True).wait(),
    "recv": lambda group: dist.recv(torch.ones(4), 1, group=group),
    "recv from any": lambda group: dist.recv(torch.ones(4), group=group),
    "send": lambda group: dist.send(torch.ones(400_000), 1, group=group),
}


def waits_in_vain():
    """[(what rank 0 is told, seconds)] of each, while rank 1 waits for it elsewhere. The first group has its
    time-out from the start, with which its ranks must also find each other."""
    found = []
    for what, call in IN_VAIN.items():
        patience = timedelta(seconds=0.5) if what == "all_reduce" else None
        group = dist.new_group(backend="shm", timeout=patience)
        if patience is None:
            group.set_timeout(timedelta(seconds=0.2))
        if dist.get_rank() == 0:
            begun = time.monotonic()
            text = raised(dist.DistBackendError, lambda call=call, group=group: call(group))
            found.append((text, time.monotonic() - begun))
        dist.barrier()
    return found


def test_a_time_out_says_who_waited_for_whom(ranks):
    for what, (text, seconds) in zip(IN_VAIN, ranks.run(2, waits_in_vain, backend="shm")[0], strict=True):
        patience = 0.5 if what == "all_reduce" else 0.2
        assert f"time-out: rank 0 has waited {patience} s" in text
        assert 0.8 * patience < seconds < patience + 1.5
        assert "from any rank" in text if what == "recv from any" else "for rank 1 in" in text
        assert what == "large" or what.split()[0] in text


def dies(victim, what):
    """The victim is killed in the midst of things; what the others are told, and how soon."""
    rank = dist.get_rank()
    x = torch.ones(2_000_000 if what != "small" else 4)
    for _ in range(3):
        dist.all_reduce(x)
    dist.barrier()
    if rank == victim:
        if what == "inside":
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()

    def go_on():
        while True:
            if what == "recv":
                dist.recv(x, victim)
            elif what == "asynchronous":
                work = dist.all_reduce(x, async_op=True)
                while not work.is_completed():
                    time.sleep(0.01)
                work.wait()
            else:
                dist.all_reduce(x)

    text = raised(dist.DistBackendError, go_on)
    again = raised(dist.DistBackendError, lambda: dist.all_reduce(torch.ones(3)))
    return text, again, time.monotonic() - begun


@pytest.mark.parametrize(
    ("world_size", "victim", "what"),
    [(2, 1, "small"), (3, 0, "inside"), (4, 2, "inside"), (2, 0, "asynchronous"), (2, 1, "recv")],
)
def test_a_killed_rank_is_named_at_once(ranks, world_size, victim, what):
    found = ranks.run(world_size, dies, victim, what, backend="shm", expect_death={victim})
    for rank, answer in enumerate(found):
        if rank == victim:
            assert answer is None
            continue
        text, again, seconds = answer
        assert f"rank {victim} (process" in text, text
        assert "died" in text, text
        assert "broken" in again
        assert seconds < 10


def leaves():
    rank = dist.get_rank()
    group = dist.new_group(backend="shm")
    if rank == 1:
        dist.destroy_process_group(group)
        dist.barrier()
        return None
    text = raised(dist.DistBackendError, lambda: dist.all_reduce(torch.ones(3), group=group))
    dist.barrier()
    return text


def test_a_rank_that_has_left_is_named(ranks):
    assert "rank 1" in (text := ranks.run(2, leaves, backend="shm")[0])
    assert "has left the group" in text


# --- waits --------------------------------------------------------------------------------------------


def wakes_the_others(late_by):
    """Seconds that a rank waits for a late one, and that many exchanges take, if a nap lasts for minutes."""
    from parallel import shm_exchange

    rank, lane = dist.get_rank(), dist.group.WORLD._lane
    dist.barrier()
    lane.words[shm_exchange.NAP_SECONDS] = 300
    if rank == 0:
        time.sleep(late_by)
    begun = time.monotonic()
    dist.all_reduce(torch.ones(4))
    waited = time.monotonic() - begun
    for count in (
        4,
        1_000_000,
    ):  # one round; more rounds than there are slots, so that ranks wait for room too
        for turn in range(50):
            if turn % dist.get_world_size() == rank:
                time.sleep(0.001)  # the others spin, yield, and then sleep
            dist.all_reduce(torch.ones(count))
    return waited, time.monotonic() - begun


@pytest.mark.parametrize("world_size", [2, 4])
def test_who_sleeps_is_woken_by_who_comes(ranks, world_size):
    first, *others = ranks.run(world_size, wakes_the_others, 0.1, timeout=20)
    assert first[0] < 1
    for waited, total in others:
        assert 0.05 < waited < 5
        assert total < 30


# --- what is left behind --------------------------------------------------------------------------------


def segments():
    """Shared memory that has a name, and processes that have ours mapped."""
    named = set(os.listdir("/dev/shm"))
    mapping = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if "perflab-shm" in Path(f"/proc/{process}/maps").read_text():
                mapping.add(int(process))
        except OSError:
            continue
    return named, mapping


def interrupted():
    """Seconds from Ctrl-C in a wait to its end on rank 1; what rank 0 is told."""
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(1)
        return raised(dist.DistBackendError, lambda: dist.all_reduce(torch.ones(1_000_000)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    raised(KeyboardInterrupt, lambda: dist.all_reduce(torch.ones(1_000_000)))
    return time.monotonic() - begun


def test_control_c_ends_a_wait(ranks):
    text, seconds = ranks.run(2, interrupted)
    assert 0.05 < seconds < 0.8
    assert "rank 1" in text
    assert "has given up" in text


def killed_in_the_midst(folder):
    """Both ranks end themselves at the same moment; the file says that the memory was there."""
    x = torch.ones(1_000_000)
    dist.all_reduce(x)
    Path(folder, str(os.getpid())).write_text(str(os.getpid() in segments()[1]))
    dist.barrier()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with contextlib.suppress(dist.DistBackendError):  # the other was killed a moment sooner
        while True:
            dist.all_reduce(x)
    signal.pause()


def test_nothing_is_left_when_all_ranks_are_killed(ranks, tmp_path):
    names, _ = segments()
    assert ranks.run(2, killed_in_the_midst, str(tmp_path), expect_death={0, 1}) == [None, None]
    mapped = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert list(mapped.values()) == ["True", "True"]
    left, mapping = segments()
    assert not mapped.keys() & mapping
    assert not [name for name in left - names if "perflab" in name]


def joins_alone(folder):
    """What rank 0 of 2 is told whose peer does not come; whether the memory is still mapped then."""
    store = dist.FileStore(f"{folder}/store", 2)
    try:
        dist.init_process_group("shm", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.5))
    except dist.DistBackendError as error:
        text = str(error)
    gc.collect()
    return text, os.getpid() in segments()[1]


def test_nothing_is_left_of_a_world_that_was_never_whole(ranks, tmp_path):
    ((text, mapped),) = ranks.run(1, joins_alone, str(tmp_path), backend=None)
    assert "has waited 0.5 s for ranks [1] to join" in text
    assert not mapped


def test_the_segment_is_private_and_has_no_name():
    from parallel.shm_segment import Segment

    created = []
    create = Segment._create

    def looked_at(self, store):
        descriptor = create(self, store)
        status = os.fstat(descriptor)
        created.append((stat.S_IMODE(status.st_mode), status.st_nlink, status.st_uid))
        with pytest.raises(OSError):
            os.ftruncate(descriptor, 4096)
        return descriptor

    before = segments()[0]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segment, "_create", looked_at)
        segment = Segment(dist.FileStore(f"{folder}/store", 1), 0, [0], 5.0)
        assert created == [(0o600, 0, os.getuid())]
        assert not [name for name in segments()[0] - before if "perflab" in name]
        assert os.getpid() in segments()[1]
        del segment
        gc.collect()
        assert os.getpid() not in segments()[1]
