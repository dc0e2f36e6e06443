"""A finished run of the tiny lab, shared by the tests that read results."""

import fcntl
import functools
import gc
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # left_running.py stands there
sys.path.insert(0, str(Path(__file__).parent / "bench"))  # command.py
sys.path.insert(0, str(Path(__file__).parent / "bench" / "traces"))  # samples.py, gloo_job.py
sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # precision.py
sys.path.insert(0, str(Path(__file__).parent / "labs"))  # stated.py, bottleneck_grid.py, one_cluster.py
sys.path.insert(0, str(Path(__file__).parent / "parallel"))  # ranks.py

import one_cluster
from command import bring_labs, perflab, read

try:
    import hypothesis
except ImportError:  # a GPU machine may lack it; the tests that need it then say so
    pass
else:
    hypothesis.settings.register_profile("perflab", deadline=None)  # how long a test takes is no property
    hypothesis.settings.load_profile("perflab")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What nohup or a script's `&` started has Ctrl-C ignored, and so have the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until all is collected: of the modules that tests import, nothing is garbage
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    # Read when torch is loaded: a thread that waits for its next piece of work sleeps. To spin would take a
    # core from the other lanes meanwhile; a file of kernels costs twice the CPU seconds by it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ANCHORS = """
from contextlib import nullcontext
from labs import calibration, machine
known = machine.load_cached()
left_s = known and calibration.FRESH_S - calibration._age_s(known)
if known and not calibration.outdated(known) and left_s > {seconds!r}:
    raise SystemExit
parts = calibration._parts
calibration._parts = lambda cores: [each for each in parts(cores) if each[0] in {wanted!r}]
calibration._first = lambda: ()
calibration._compilers = lambda: nullcontext(())
calibration.largest_working_set = lambda *sizes: 2**24
machine.save(calibration.calibrate(sweeps=1))
"""
WHOLE = """
from labs import calibration, machine
if machine.load_cached() is None:
    machine.save(calibration.calibrate(sweeps=1))
"""
LONG = (
    *("labs/test_train.py", "labs/test_serving_live.py", "labs/test_tuning_workers.py"),
    *("kernels/test_ahead_of_time.py", "kernels/test_operations.py", "bench/test_run.py"),
    "kernels/test_interpreter.py",
    *("bench/test_profile_program.py", "parallel/test_fsdp.py", "kernels/test_attention_gpu.py"),
    *("kernels/test_compiled_cache.py", "bench/test_profile_labs.py", "labs/test_jax_transforms.py"),
    *("parallel/test_shm.py", "labs/test_pipeline.py", "bench/test_plugin.py", "test_readme.py"),
    *("parallel/test_checkpoint.py", "kernels/test_threads.py", "labs/test_programming_models.py"),
)
"""Files that take long, the longest first: a lane that came to one last would run alone at the end. The first
three begin a lane each: the one of the ranks, the one of the Ray cluster, and that of what compiles."""


def pytest_ignore_collect(collection_path, config):
    """For a lane of marked tests: files that have none are not imported, to save seconds; what they import a
    GPU machine may lack. The kernels' fixture ``device`` brings the mark of the GPU itself."""
    lane = config.option.markexpr.partition(" ")[0]
    if not collection_path.name.startswith("test_") or lane not in ("alone", "gpu"):
        return None
    marked = rf"mark\.{lane}"
    if lane == "gpu" and collection_path.parent.name == "kernels":
        marked += r"|^def test_\w+\([^)]*\bdevice\b"
    return None if re.search(marked, collection_path.read_text(), re.MULTILINE) else True


def pytest_collection_modifyitems(items):
    """The order in which pytest-xdist hands out files under --no-loadscope-reorder."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish():
    """What lives as long as the session, modules and tests, is not looked through at each collection of
    garbage: half a second each, of which ``parallel.memory`` asks for one a count."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files to lanes (``--dist loadfile``), and to one lane those that use one Ray cluster, to one those that
    use the pool of ranks: each lane that does has a fork server of its own, whose ranks are all cold."""
    gc.enable()  # this process leaves collecting to the lanes
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            if file.endswith(one_cluster.FILES):
                return "one cluster"
            return "one pool of ranks" if runs_ranks(config.rootpath / file) else file

    return Together(config, log)


@functools.cache
def runs_ranks(path):
    return "ranks.run(" in path.read_text()


@pytest.fixture(scope="session", autouse=True)
def home(pytestconfig, tmp_path_factory):
    """Calibration, history and compiled code: kept between test runs, away from the user's own."""
    cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
    make = cache.mkdir if cache else tmp_path_factory.mktemp
    folder, compiled = make("perflab"), make("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERFLAB_HOME", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(compiled))
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            patch.delenv(name, raising=False)  # in a test's own pytest it would switch benchmarks off
        yield folder


@pytest.fixture
def compiling_alone(home):
    """No other worker compiles what operations ship for GPUs: what one has compiled, the next one finds."""
    with open(home / "compiling.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def in_process(monkeypatch, capsys):
    """The command within this process, which is quicker: (exit status, stdout, stderr)."""
    from bench import cli

    def called(*arguments):
        monkeypatch.setattr("sys.argv", ["perflab", *map(str, arguments)])
        monkeypatch.setattr("sys.path", [*sys.path])  # inspect adds the folder
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return called


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name): (a folder, whether its content is still to be made), one for all workers of pytest-xdist:
    whoever comes first makes it while the others wait."""

    @contextmanager
    def held(name):
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if IN_WORKER else base) / name
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder, not (folder / "made").exists()
            (folder / "made").touch()

    return held


@pytest.fixture(scope="session")
def calibrated(home, once):
    """What ``perflab run`` checks of a machine before it measures is known, and so fresh that a neighbour who
    takes a core makes no other machine of it for as long as these tests take. What the lanes found fresh
    enough is fresh enough for the tests that run alone after them. Labs that predict from more need
    ``measured``."""
    with once("calibrated") as (_, to_be_made):
        if to_be_made:
            wanted = ("interpreter", "arithmetic peaks")
            program = ANCHORS.format(wanted=wanted, seconds=300.0 if IN_WORKER else 90.0)
            subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.fixture
def measured(pytestconfig, home, tmp_path, monkeypatch):
    """All constants of this machine, in a home of their own, as the first run on a machine measures them, but
    not as often as 15 s allow. For proofs: it takes most of a minute, kept between test runs."""
    cache = getattr(pytestconfig, "cache", None)
    monkeypatch.setenv("PERFLAB_HOME", str(cache.mkdir("perflab-measured") if cache else tmp_path / "home"))
    subprocess.run([sys.executable, "-c", WHOLE], check=True, timeout=300)


@pytest.fixture(scope="session")
def finished_run(calibrated, once):
    """(folder with results.json and results.html, stdout) of ``perflab run tiny_lab --quick``."""
    with once("finished-run") as (folder, to_be_made):
        if to_be_made:
            bring_labs(folder, "tiny_lab")
            status, out, err = perflab("run", "tiny_lab", "--quick", folder=folder)
            assert status == 0, err
            (folder / "out.txt").write_text(out)
    return folder, (folder / "out.txt").read_text()


@pytest.fixture(scope="session")
def results(finished_run):
    return read(finished_run[0] / "results.json")


@pytest.fixture(scope="session")
def ranks():
    """One pool of ranks for all tests of a worker: see ``tests/parallel/ranks.py``."""
    from ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()
