"""``make gpu`` needs torch, triton, numba, numpy, pytest and pytest-benchmark, and no installed perflab."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("hypothesis", "scipy", "playwright", "psutil", "rich", "typer", "jax", "ray", "matplotlib")
PROGRAM = f"""
import sys
from functools import partial
from importlib.machinery import PathFinder

def present(find, name, *rest):
    return None if name.split(".")[0] in {ABSENT} else find(name, *rest)

PathFinder.find_spec = partial(present, PathFinder.find_spec)  # no function: pytest keeps it in a class

import pytest
raise SystemExit(pytest.main(sys.argv[1:]))
"""


def lean(*arguments):
    """pytest where nothing else can be imported, with pytest-benchmark's plugin alone."""
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", "-p", "benchmark"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )


def of_make_gpu(what):
    """The arguments of the line of ``make gpu`` that names ``what``."""
    recipe = re.search(r"^gpu:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    (line,) = (line for line in recipe[1].splitlines() if what in line)
    return shlex.split(line.partition("-m pytest ")[2])


def test_the_gpu_tests_are_collected():
    done = lean(*of_make_gpu("tests/kernels"), "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    mark, device = r"^@pytest\.mark\.gpu", r"^def test_\w+\([^)]*\bdevice\b"
    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(mark, text := path.read_text(), re.MULTILINE)
        or (path.parent.name == "kernels" and re.search(device, text, re.MULTILINE))
    ]
    assert len(marked) > 8
    for path in marked:
        assert str(path.relative_to(ROOT)) in done.stdout
    assert "test_values_and_gradients_are_as_accurate_as_torchs[cuda-softmax" in done.stdout
    assert "test_cuda_variants_compute_the_same" in done.stdout


@pytest.mark.proof
def test_the_suite_of_kernels_runs_and_prints_its_table():
    words = [word for word in of_make_gpu("bench/suites") if not word.startswith("--benchmark-json")]
    words[words.index("cuda")] = "cpu"
    done = lean(*words, "-k", "softmax and forward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels beside the best peer" in done.stdout
    assert "softmax forward" in done.stdout
