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
    group.addoption("--perflab-left-out", default=None, help="peers that test_kernels.py need not call again")
    group.addoption(
        "--write-crossover", action="store_true", help="let test_crossover.py update kernels/crossover.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    """On a machine where perflab is not installed (``make gpu``) its plugin is loaded from here."""
    from bench import plugin

    if not config.pluginmanager.is_registered(plugin):
        config.pluginmanager.register(plugin, "perflab")
