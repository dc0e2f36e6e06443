"""kernels/threads.py: every chunk once, whatever the threads; forks, other runtimes, wrong arguments."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import kernels
from kernels import threads
from kernels.activation import cpu_softmax
from kernels.op import FallbackWarning
from kernels.simd import vector_bits
from kernels.threads import chunked, chunks_of


@chunked
def count(chunk, counts, step, twice):
    counts[chunk] += step
    if twice:
        counts[chunk] += step


@chunked
def describe(chunk, table, scale, missing, out):
    out[0, 0] = table.shape[0]
    out[0, 1] = table.shape[1]
    out[0, 2] = table[1, 2] * scale
    out[0, 3] = 1 if missing is None else 0


@pytest.fixture(params=[1, 2, 5])
def number_of_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunks", [1, 2, 7, 1000])
def test_every_chunk_runs_once(number_of_threads, chunks):
    counts = torch.zeros(chunks, dtype=torch.int64)
    count(chunks, counts, 3, False)
    count(chunks, counts, 2, True)
    assert counts.eq(7).all()


def test_no_chunks_is_no_work():
    counts = torch.zeros(1, dtype=torch.int64)
    count(0, counts, 1, False)
    assert counts.item() == 0


def test_arguments_arrive_as_they_are():
    table, out = torch.arange(6.0).view(2, 3), torch.zeros(1, 4)
    describe(1, table, 0.5, None, out)
    assert out.tolist() == [[2, 3, 2.5, 1]]
    describe(1, table.double(), 0.5, table, out)
    assert out.tolist() == [[2, 3, 2.5, 0]]


def test_one_thread_starts_no_team(monkeypatch):
    def refuse():
        raise AssertionError("a team was started")

    monkeypatch.setattr(threads, "_gomp_parallel", refuse)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counts = torch.zeros(4, dtype=torch.int64)
        count(4, counts, 1, False)
    finally:
        torch.set_num_threads(before)
    assert counts.eq(1).all()


def test_without_gnu_openmp_python_threads_take_the_chunks(monkeypatch, number_of_threads):
    monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    counts = torch.zeros(50, dtype=torch.int64)
    count(50, counts, 1, False)
    assert counts.eq(1).all()


def test_the_runtime_is_torchs_own():
    entry = threads._gomp_parallel()
    if entry is None:
        pytest.skip("torch has no GNU OpenMP here")
    torch.ones(10**6).add_(1)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in mapped if "libgomp" in line}
    folder = os.path.dirname(torch.__file__)
    assert any(path.startswith(folder) for path in runtimes) or len(runtimes) == 1


def test_two_python_threads_at_once():
    tables = [torch.zeros(300, dtype=torch.int64) for _ in range(4)]

    def work(table):
        for _ in range(20):
            count(300, table, 1, False)

    workers = [threading.Thread(target=work, args=(table,)) for table in tables]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(table.eq(20).all() for table in tables)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_on_one_thread_instead_of_hanging(every_size):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(30, 1024)
        expected = kernels.softmax(x, -1)  # the team is started
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit(0 if torch.equal(kernels.softmax(x, -1), expected) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(kernels.softmax(x, -1), expected)  # and the parent goes on
    finally:
        torch.set_num_threads(before)


def softmax_is_right():
    x = torch.linspace(-5, 5, 999).view(9, 111)
    for y, bound in ((x, 1e-7), (x.bfloat16(), 1e-3)):
        assert (kernels.softmax(y, -1) - torch.softmax(y.double(), -1)).abs().max() < bound


@pytest.mark.skipif(threads._gomp_parallel() is None, reason="torch has no GNU OpenMP runtime here")
@pytest.mark.parametrize("lacks_openmp", [True, False])
def test_without_torchs_openmp_runtime_it_computes_the_same_and_says_so_once(
    every_size, monkeypatch, number_of_threads, lacks_openmp
):
    if lacks_openmp:
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    monkeypatch.setattr(cpu_softmax._forward, "_workers", {})  # as in a new process
    threads._say_what_is_not_used.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        softmax_is_right()
    said = [str(warning.message) for warning in caught if warning.category is FallbackWarning]
    assert len(said) == (lacks_openmp and number_of_threads > 1)
    assert all("no GNU OpenMP runtime" in text for text in said)


def test_without_wide_registers_it_computes_the_same_and_says_so_once():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import kernels.op, test_threads\n"
        "kernels.op.crossover = lambda name, device: 0\n"
        "test_threads.softmax_is_right()\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "FallbackWarning: kernels: " in line]
    assert len(warned) == (vector_bits() > 128)
    assert all("vectors of" in line for line in warned)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"count takes no tensor of torch\.complex64"):
        count(1, torch.zeros(1, dtype=torch.complex64), 1, False)
    with pytest.raises(TypeError, match="count takes tensors, numbers and None, no str"):
        count(1, torch.zeros(1, dtype=torch.int64), "one", False)


def test_chunks_depend_on_sizes_alone():
    assert chunks_of(0) == 1
    assert chunks_of(10) == 10
    assert chunks_of(10, least=4) == 2
    assert chunks_of(10**6) == 256


@chunked
def who(chunk, told, slow, places):
    places[chunk] = threads._thread_number(told)
    for step in range(200_000 if chunk < slow else 20_000):
        if places[chunk] > 1:  # never: so that the loop stays
            places[chunk] += step


def takers(slow):
    """Which of two threads computed which of 16 chunks, of which the first ones may be slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        places = torch.full((16,), -1, dtype=torch.int64)
        who(16, threads._address_of_thread_number(), slow, places)
        return places.tolist()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(threads._gomp_parallel() is None, reason="torch has no GNU OpenMP runtime here")
def test_each_thread_has_its_range_and_helps_with_the_others():
    """On a busy machine one may be late, and the other takes its chunks. 200 tries may all fall into one turn
    of another process on a core; then both threads get theirs within the seconds."""
    takers(0)

    def tried(slow, seen, seconds=20.0):
        found, end = [takers(slow) for _ in range(200)], time.monotonic() + seconds
        while not any(map(seen, found)) and time.monotonic() < end:
            time.sleep(0.01)
            found.append(takers(slow))
        return found

    alike = tried(0, lambda found: found == [0] * 8 + [1] * 8)
    assert [0] * 8 + [1] * 8 in alike
    assert [1] * 8 + [0] * 8 not in alike
    assert any(1 in found[:8] for found in tried(8, lambda found: 1 in found[:8]))
