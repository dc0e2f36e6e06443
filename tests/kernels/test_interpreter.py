"""Every operation's Triton kernels in the interpreter, held to the rule of accuracy.

``TRITON_INTERPRET`` is read where kernels are decorated, so a child process runs the tests: interpreted.py,
from test_operations.py the accuracy test on the case that stands for all (under ``make proof`` on every
case, in every dtype), and what a family's own files mark ``interpreted``. A test whose launches have too many
programs is skipped (conftest.py), which counts as a failure unless every case is run.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from families import family_of, has_triton_kernels

from kernels.spec import FAMILIES, operations

pytest.importorskip("triton")

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
ACCURACY = "test_values_and_gradients_are_as_accurate_as_torchs"


def special_files(family):
    """Those of a family's own test files that have tests for the interpreter."""
    return [path for path in HERE.glob(f"test_{family}*.py") if "mark.interpreted" in path.read_text()]


def interpreted(folder, cases, programs=24):
    """Run the tests in a child, on the "first" or "all" cases: {(file, test): (outcome, text)}."""
    tests = [
        HERE / "interpreted.py",
        HERE / "test_operations.py",
        *(path for name in FAMILIES if has_triton_kernels(name) for path in special_files(name)),
    ]
    report = folder / "report.xml"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "TRITON_INTERPRET": "1",
        # NumPy's products of small matrices: more threads only wait for each other.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "INTERPRETED_CASES": cases,
        "INTERPRETED_PROGRAMS": str(programs),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "interpreted and not gpu" + (" and not proof" if cases == "first" else ""),
    ]
    done = subprocess.run(
        [*command, f"--junit-xml={report}", *tests],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = [child for child in case if child.tag in ("failure", "error", "skipped")]
        kind, text = (outcome[0].tag, outcome[0].get("message", "")) if outcome else ("passed", "")
        found[case.get("classname").rpartition(".")[2], case.get("name")] = (kind, text)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("interpreted"), "first")


def broken(found, allowed=("passed",)):
    return "\n".join(f"{name}: {kind}: {text}" for name, (kind, text) in found.items() if kind not in allowed)


def test_bfloat16_is_right(outcomes):
    found = {key: outcome for key, outcome in outcomes.items() if key[0] == "interpreted"}
    assert len(found) >= 10
    assert not broken(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_triton_kernels_are_as_accurate_as_torch(name, outcomes):
    if not has_triton_kernels(name):
        pytest.skip(f"kernels/{name} has no Triton kernels yet")
    named = [
        f"{ACCURACY}[cpu-{operation.name}-" for operation in operations() if family_of(operation) == name
    ]
    ours = {key: outcome for key, outcome in outcomes.items() if key[1].startswith(tuple(named))}
    assert len(ours) == len(named)
    files = {path.stem for path in special_files(name)}
    special = {key: outcome for key, outcome in outcomes.items() if key[0] in files}
    assert {file for file, _ in special} == files
    assert ours or special, f"mark tests in test_{name}.py: interpreted"
    assert not broken(ours | special)


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_triton_kernels_are_as_accurate_as_torch_on_every_case(tmp_path):
    found = interpreted(tmp_path, "all", programs=512)
    print("\n" + broken(found))
    assert not broken(found, ("passed", "skipped"))
