"""Imports go down only: kernels < parallel < labs < bench. Read from the syntax trees, so that nothing hides
inside a function."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "parallel", "labs", "bench")


def imported_packages(source):
    """Top-level names of everything imported anywhere in the source, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.split(".")[0]


def upward(source, floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    return [f"line {line}: {package}" for line, package in imported_packages(source) if package in above]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_import_goes_up(floor):
    found = {}
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        lines = upward(path.read_text(), floor)
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert not found


def test_the_check_sees_every_form_of_import():
    source = (
        "def f():\n import bench.stats\n from labs import x\n import_module('bench.cli')\n from . import y\n"
    )
    assert upward(source, "kernels") == ["line 2: bench", "line 3: labs", "line 4: bench"]
    assert upward(source, "labs") == ["line 2: bench", "line 4: bench"]


ONE_AFTER_THE_OTHER = """
import importlib, pathlib, sys
import kernels
kernels.matmul_bf16
print(*sys.modules)
for path in sorted(pathlib.Path("parallel").rglob("*.py")):
    if path.stem not in ("memory", "__init__"):
        importlib.import_module(".".join(path.with_suffix("").parts))
import labs.data_parallel as lab
from labs.lab import configure
from labs.data_parallel.model import memory
memory(configure(lab.LAB, "quick"), "zero1")
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def loaded():
    """The modules that there are in a process that asks for a product, and in the same one once it has all
    strategies as well: one start of torch for both."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_products_load_no_micro_kernels(loaded):
    """Those of ``kernels.peaks`` have signatures: whoever imports them compiles or loads them."""
    with_products, _ = loaded
    assert "kernels.matmul.cpu_amx" in with_products
    assert not {"kernels.peaks", "kernels.peaks_matrix"} & with_products


def test_no_strategy_slows_torchs_allocator_down(loaded):
    """``parallel.memory`` sets a switch for the life of a process, which slows small operations down."""
    _, with_strategies = loaded
    assert "parallel.fsdp" in with_strategies
    assert "parallel.memory" not in with_strategies
