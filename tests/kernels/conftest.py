"""In Triton's interpreter a program takes 10 to 20 ms: tests that would run many of them are skipped."""

import os

import pytest

from kernels.interpreter import interpreting

PROGRAMS = int(os.environ.get("INTERPRETED_PROGRAMS", "24"))
"""The most programs a launch may have in the interpreter."""


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
