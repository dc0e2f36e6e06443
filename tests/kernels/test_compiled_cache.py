"""kernels/compiled_cache.py: the same code is not compiled twice, another one is never taken for it."""

import fcntl
import math
import os
import subprocess
import sys
import threading
import time

import numba
import numpy
import precision
import pytest
import torch

from kernels import compiled_cache
from kernels import inspect as inspection
from kernels.compiled_cache import address_of
from kernels.compiled_once import compiled_once, floats_at
from kernels.inspect import assembly_of
from kernels.threads import chunked


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch):
    """Functions that numba was asked to compile."""
    found = []
    original = numba.cfunc

    def counted(*arguments, **options):
        compile_it = original(*arguments, **options)
        return lambda function: found.append(function.__name__) or compile_it(function)

    monkeypatch.setattr(numba, "cfunc", counted)
    return found


def make_scale(factor):
    """A body whose code is the same for every factor: only what it closes over differs."""

    @chunked
    def scale(chunk, x):
        for i in range(x.size):
            x[i] *= factor

    return scale


def scaled(factor):
    x = torch.ones(5)
    make_scale(factor)(1, x)
    return x.tolist()


def test_a_second_process_would_load_what_the_first_compiled(folder, compilations):
    assert scaled(3.0) == scaled(3.0) == [3.0] * 5
    assert compilations == ["scale"]
    assert len(list(folder.glob("*/*"))) == 1


def test_what_a_body_closes_over_tells_it_apart(folder, compilations):
    assert (scaled(3.0), scaled(5.0)) == ([3.0] * 5, [5.0] * 5)
    assert len(compilations) == 2


def test_a_function_that_a_body_calls_tells_it_apart(folder, compilations):
    def with_inner(inner):
        @chunked
        def apply(chunk, x):
            for i in range(x.size):
                x[i] = inner(x[i])

        x = torch.ones(3)
        apply(1, x)
        return x.tolist()

    assert with_inner(numba.njit(lambda value: value + 1)) == [2.0] * 3
    assert with_inner(numba.njit(lambda value: value + 2)) == [3.0] * 3
    assert len(compilations) == 2


def test_types_of_arguments_and_flags_tell_it_apart(folder, compilations):
    scale = make_scale(2.0)
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        scale(1, x)
        assert x.tolist() == [2.0, 2.0]
    assert len(compilations) == 2


@pytest.fixture
def held(folder, monkeypatch):
    """The file of whatever is asked for, which another process seems to be compiling, and that one's lock."""
    path = folder / "text" / "code"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(compiled_cache, "_path", lambda *asked: path)
    scaled(5.0)
    with path.with_name("code.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.rename(folder / "compiled")
        yield path, lock


def test_whoever_comes_second_waits_and_loads(held, folder, compilations):
    """Two ranks that need the same reduction ask for it at the same time."""
    path, lock = held
    results = []
    thread = threading.Thread(target=lambda: results.append(scaled(3.0)))
    thread.start()
    time.sleep(0.3)
    assert results == []
    (folder / "compiled").rename(path)
    path.with_name("code.lock").unlink()
    lock.close()
    thread.join(compiled_cache.PATIENCE_SECONDS / 2)
    assert not thread.is_alive()
    assert (results, compilations) == ([[5.0] * 5], [])  # what the first left there


def test_who_is_stopped_while_compiling_stops_no_other(held, compilations, monkeypatch):
    monkeypatch.setattr(compiled_cache, "PATIENCE_SECONDS", 0.2)
    assert scaled(3.0) == [3.0] * 5
    assert compilations == ["scale"]
    assert [each.name for each in held[0].parent.iterdir()] == ["code"]


@pytest.mark.parametrize("damage", [b"", b"short", lambda content: content[:-1] + b"x"])
def test_a_damaged_file_is_compiled_anew_and_replaced(folder, compilations, damage):
    scaled(3.0)
    (path,) = folder.glob("*/*")
    content = path.read_bytes()
    path.write_bytes(damage(content) if callable(damage) else damage)
    assert scaled(3.0) == [3.0] * 5
    assert len(compilations) == 2
    scaled(3.0)
    assert len(compilations) == 2


def test_another_text_of_the_package_is_compiled_anew(folder, compilations, monkeypatch):
    scaled(3.0)
    monkeypatch.setattr(compiled_cache, "_surroundings", lambda: "another version")
    scaled(3.0)
    assert len(compilations) == 2


def test_what_nobody_used_for_a_month_is_removed(folder, compilations, monkeypatch):
    ages = {"used lately": 1, "unused": 31}
    for text, days in ages.items():
        monkeypatch.setattr(compiled_cache, "_surroundings", lambda text=text: text)
        scaled(3.0)
        then = time.time() - days * 24 * 3600
        for path in (folder / text, *(folder / text).iterdir()):
            os.utime(path, (then, then))
    monkeypatch.setattr(compiled_cache, "_surroundings", lambda: "new")
    scaled(3.0)
    assert {path.name for path in folder.iterdir()} == {"new", "used lately"}


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, compilations, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PERFLAB_HOME", str(blocked))
    assert scaled(7.0) == [7.0] * 5


class Local:
    size = 3


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda: 1, {"odd": object()}),
        (lambda: precision.as_tuple(1), {}),  # the text of that module is not known
        (lambda: Local.size, {}),
    ],
    ids=["option", "module", "class"],
)
def test_what_cannot_be_described_is_not_kept(folder, function, options):
    assert compiled_cache._path("void()", function, options) is None
    assert compiled_cache._path("void()", lambda: math.pi, {}) is not None


# --- assembly ------------------------------------------------------------------------------------

FACTOR = 3.0


def make_kernel():
    """A function of its own each time, with the same text."""

    @numba.njit
    def scale(x):
        for i in range(x.size):
            x[i] *= FACTOR

    return scale


@pytest.fixture
def copies(monkeypatch):
    """Types of the functions that were compiled to be looked at."""
    found, original = [], inspection._compiled_copy
    monkeypatch.setattr(
        inspection, "_compiled_copy", lambda function, types: found.append(types) or original(function, types)
    )
    return found


def test_assembly_is_read_again_and_compiled_anew_where_it_differs(folder, copies, monkeypatch):
    single, double = (numba.float32[::1],), (numba.float64[::1],)
    first = assembly_of(make_kernel(), single)
    assert "mul" in first
    assert assembly_of(make_kernel(), single) == first
    assert copies == [single]
    assert assembly_of(make_kernel(), double) != first
    assert copies == [single, double]
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    assembly_of(make_kernel(), single)
    assert len(copies) == 3
    for path in folder.glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assembly_of(make_kernel(), single)
    assert len(copies) == 4


def test_what_was_compiled_when_a_global_was_another_is_shown_and_not_kept(folder, copies, monkeypatch):
    kernel, x = make_kernel(), numpy.ones(3, numpy.float32)
    kernel(x)
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    assembly_of(kernel, kernel.signatures[0])
    assert not copies
    assert not list(folder.glob("*/*"))


IN_THREE_PROCESSES = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from shared import body

for attempt in range(3):
    child = os.fork()
    if child == 0:
        x = torch.ones(4)
        body(1, x)
        # numba needs this module to compile, and it takes 0.3 s.
        print(x.tolist(), "numba.np.linalg" in sys.modules, flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kept = sorted(Path(os.environ["PERFLAB_HOME"], "kernels").glob("*/*"))
    print(len(kept), flush=True)
    if attempt == 1:
        next(path for path in kept if path.name.startswith("add_one")).unlink()
"""


def test_functions_called_by_symbol_are_found_again(tmp_path):
    """In three processes: the first compiles, the second loads, the third has lost the called one."""
    (tmp_path / "shared.py").write_text(
        "from kernels.compiled_once import address, compiled_once, floats_at\n"
        "from kernels.threads import chunked\n"
        "@compiled_once()\n"
        "def add_one(place, count):\n"
        "    x = floats_at(place, count)\n"
        "    for i in range(count):\n"
        "        x[i] += 1\n"
        "@chunked\n"
        "def body(chunk, x):\n"
        "    add_one(address(x, 0), x.size)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", IN_THREE_PROCESSES, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PERFLAB_HOME": str(tmp_path / "home")},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    compiled = [f"[2.0, 2.0, 2.0, 2.0] {attempt != 1}" for attempt in range(3)]
    assert done.stdout.splitlines() == [line for each in compiled for line in (each, "2")]


def test_the_cfunc_of_a_signature_is_callable_from_c(folder):
    import ctypes

    def double(value):
        return value * 2

    for kind, of_c in ((numba.types.int64, ctypes.c_int64), (numba.types.float64, ctypes.c_double)):
        address, kept = address_of(kind(kind), double, {})
        assert ctypes.CFUNCTYPE(of_c, of_c)(address)(21) == 42
        assert kept is not None


def test_compiled_once_takes_numbers():
    @compiled_once(floats=("value",))
    def fill(place, count, value):
        x = floats_at(place, count)
        for i in range(count):
            x[i] = value

    assert [str(kind) for kind in fill.kinds] == ["int64", "int64", "float32"]


def test_what_numba_keeps_is_compiled_anew_when_another_file_of_the_package_changes(tmp_path, monkeypatch):
    """The file of ``outer`` stays as it is; what it calls does not."""
    (tmp_path / "stays.py").write_text("def outer():\n    return inner()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stays", raising=False)
    import stays

    for text, number in (("one text", 1), ("another text", 2), ("another text", 3)):
        inner = numba.njit(eval(f"lambda: {number}"))
        monkeypatch.setattr(stays, "inner", inner, raising=False)
        monkeypatch.setattr(compiled_cache, "_text", lambda text=text: text)
        kept = compiled_cache.njit_kept("int64()")(stays.outer)
        assert kept() == min(number, 2), "the third time nothing is compiled"
