"""A finished run of the tiny lab, shared by the tests that read results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))  # command.py stands there

from command import bring_labs, perflab, read


@pytest.fixture(scope="session", autouse=True)
def home(pytestconfig, tmp_path_factory):
    """Calibration and history of the tests: kept between test runs, away from the user's own."""
    cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
    folder = cache.mkdir("perflab") if cache else tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERFLAB_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(folder with results.json and results.html, stdout) of ``perflab run tiny_lab --quick``."""
    folder = tmp_path_factory.mktemp("run")
    bring_labs(folder, "tiny_lab")
    status, out, err = perflab("run", "tiny_lab", "--quick", folder=folder)
    assert status == 0, err
    return folder, out


@pytest.fixture(scope="session")
def results(finished_run):
    return read(finished_run[0] / "results.json")
