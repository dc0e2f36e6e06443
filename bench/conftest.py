"""Options of the suites: ``pytest bench --quick``. They live here and not in the plugin, so that an
installed perflab claims no option names in other projects' tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perflab suites")
    size = "sizes and time of the labs' suites"
    group.addoption(
        "--quick", action="store_const", const="quick", dest="perflab_scale", help=f"small {size}"
    )
    group.addoption("--full", action="store_const", const="full", dest="perflab_scale", help=f"large {size}")
    group.addoption("--perflab-plan", default=None, help="run the plan in this file (used by perflab run)")
    group.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), dest="perflab_device", help="of test_kernels.py"
    )
    group.addoption("--perflab-rows", default=None, help="append the rows of test_kernels.py to this file")
