"""A finished run of the tiny lab, shared by the tests that read results."""

import fcntl
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))  # command.py stands there
sys.path.insert(0, str(Path(__file__).parent / "bench" / "traces"))  # samples.py, gloo_job.py
sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # precision.py
sys.path.insert(0, str(Path(__file__).parent / "labs"))  # stated.py, bottleneck_grid.py
sys.path.insert(0, str(Path(__file__).parent / "parallel"))  # ranks.py

from command import bring_labs, perflab, read

try:
    import hypothesis
except ImportError:  # a GPU machine may lack it; the tests that need it then say so
    pass
else:
    hypothesis.settings.register_profile("perflab", deadline=None)  # how long a test takes is no property
    hypothesis.settings.load_profile("perflab")

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


@pytest.fixture(scope="session", autouse=True)
def home(pytestconfig, tmp_path_factory):
    """Calibration and history of the tests: kept between test runs, away from the user's own."""
    cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
    folder = cache.mkdir("perflab") if cache else tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERFLAB_HOME", str(folder))
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            patch.delenv(name, raising=False)  # in a test's own pytest it would switch benchmarks off
        yield folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(folder with results.json and results.html, stdout) of ``perflab run tiny_lab --quick``.

    One run for all workers of pytest-xdist: whoever holds the lock first makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if IN_WORKER else base) / "finished-run"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "out.txt").exists():
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
