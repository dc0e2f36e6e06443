"""In Triton's interpreter a program takes 10 to 20 ms: tests that would run many of them are skipped."""

import os

import pytest
import torch
from families import family_of, has_triton_kernels

from kernels.interpreter import interpreting
from kernels.op import without_crossover

PROGRAMS = int(os.environ.get("INTERPRETED_PROGRAMS", "24"))
"""The most programs a launch may have in the interpreter."""


def pytest_collection_modifyitems(items):
    """For test_interpreter.py: operations that have Triton kernels, on the case that stands for all."""
    if "INTERPRETED_CASES" not in os.environ:
        return
    first = os.environ["INTERPRETED_CASES"] == "first"

    def chosen(operation=None, case=None, **others):
        if operation is None:
            return True
        return has_triton_kernels(family_of(operation)) and (not first or case is operation.cases[1])

    items[:] = [item for item in items if chosen(**getattr(getattr(item, "callspec", None), "params", {}))]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return request.param


@pytest.fixture
def every_size():
    """No crossover to torch for small tensors: the kernels run."""
    with without_crossover():
        yield


@pytest.fixture(autouse=interpreting())
def few_programs(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid = InterpreterBuilder.set_grid_dim

    def limited(self, *grid):
        programs = grid[0] * grid[1] * grid[2]
        if programs > PROGRAMS:
            pytest.skip(f"a launch of {programs} programs, more than {PROGRAMS}")
        return set_grid(self, *grid)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", limited)
