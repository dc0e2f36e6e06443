"""The pytest plugin: the fixture ``paired``, on top of pytest-benchmark.

    def test_faster(paired):
        result = paired(base=lambda: old(x), new=lambda: new(x))
        assert result.verdict == "faster", str(result)

Every function becomes an ordinary entry of pytest-benchmark (its table, its JSON, its ``compare``). Until the
fixture is used this module imports nothing but the standard library and pytest, so that having perflab
installed costs other test suites nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from bench.stats import Comparison

USED = pytest.StashKey[bool]()
COMPARISONS = pytest.StashKey[list[str]]()
WORLDS = pytest.StashKey[Any]()
TABLES = pytest.StashKey[list[Callable[[int], str]]]()
"""What suites print at the end: functions of the terminal's width."""
SECONDS_PER_FUNCTION = 0.9  # pytest-benchmark's default is 1 s and its calibration


def register(
    benchmark: Any,
    name: str,
    seconds: list[float],
    iterations: int,
    extra_info: dict[str, Any],
    group: str | None,
) -> Any:
    """Enter samples as one more benchmark of the test that ``benchmark`` belongs to; returns the entry.

    pytest-benchmark has one entry a fixture; a copy of the fixture under another name makes the next.
    """
    entry = copy.copy(benchmark)
    test, _, parameter = benchmark.fullname.partition("[")
    parameter = f"{parameter.rstrip(']')}/{name}" if parameter else name
    entry.name = f"{benchmark.name.partition('[')[0]}[{parameter}]"
    entry.fullname = f"{test}[{parameter}]"
    entry.param = parameter
    entry.params = None
    entry.extra_info = extra_info
    entry.group = group if group is not None else benchmark.group
    entry._mode = benchmark._mode = "paired(...)"
    statistics = entry._make_stats(iterations)
    for value in seconds:
        statistics.stats.update(value)
    return statistics


class Paired:
    """Times functions in interleaved, shuffled rounds. See ``bench.rounds`` and ``bench.stats``."""

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any) -> None:
        self._request, self._benchmark = request, benchmark
        self.medians: dict[str, float] = {}
        """Seconds of one call by name, after the comparison."""
        self.extra_info: dict[str, dict[str, Any]] = {}
        """What is saved beside each name's samples; a test may add to it."""

    def __call__(
        self,
        *,
        seconds: float | None = None,
        clock: str = "host",
        tolerance: float | None = None,
        processes: int = 1,
        **functions: Callable[[], object] | str,
    ) -> Comparison | dict[str, Comparison]:
        """Compare ``new=g`` with ``base=f``; with more names, each of the others with the first.

        seconds: time for all functions together (default 0.9 s a function): warm-up and rounds, after the
            first calls, which may compile.
        clock: ``host``, ``jax`` or ``cuda``, see ``bench.clocks``.
        tolerance: differences below it are *same* (default 0.02).
        processes: with more than one, functions are named ``"package.module:setup"``; setup() runs on
            every rank of a torch.distributed world and returns the step. A sample is the slowest rank's.
        Returns a Comparison, or one per further name. Raises ValueError for fewer than two functions and
        TypeError for what is not callable.
        """
        from bench import stats
        from bench.clocks import clock as make_clock
        from bench.rounds import Timed, pairs, time_together
        from bench.world.steps import WorldClock, WorldStep

        if len(functions) < 2:
            raise ValueError("paired needs at least two functions: paired(base=f, new=g)")
        for name, function in functions.items():
            if processes > 1 and not (isinstance(function, str) and ":" in function):
                raise TypeError(f"{name}: with processes={processes} give 'package.module:setup'")
            if processes == 1 and not callable(function):
                kind = type(function).__name__
                raise TypeError(f"{name} must be callable without arguments, not {kind}")
        if self._benchmark._mode:
            raise ValueError("paired (or benchmark) was already used in this test; one call a test")
        self._request.config.stash[USED] = True
        base, *others = functions
        if self._benchmark.disabled:
            for function in functions.values():
                if callable(function):
                    function()
            self._benchmark._mode = "paired(...)"
            pytest.skip("benchmarks are disabled: each function ran once, nothing was compared")
        limit = SECONDS_PER_FUNCTION * len(functions) if seconds is None else seconds
        timed: dict[str, Timed] = {}
        with contextlib.ExitStack() as steps:
            for name, function in functions.items():
                if processes > 1:
                    world = self._worlds().of_size(processes)
                    step = steps.enter_context(contextlib.closing(WorldStep(world, "", {}, str(function))))
                    timed[name] = Timed(step, WorldClock())
                else:
                    timed[name] = Timed(cast("Callable[[], object]", function), make_clock(clock))
            time_together(timed, limit)
        results = {}
        for name in others:
            base_seconds, new_seconds = pairs(timed[base], timed[name])
            band = stats.TOLERANCE if tolerance is None else tolerance
            results[name] = stats.compare_pairs(base_seconds, new_seconds, tolerance=band)
        self._enter(timed, base, results)
        return results if len(others) > 1 else results[others[0]]

    def _worlds(self) -> Any:
        """The session's worlds; they end with it."""
        from bench.world.steps import Worlds

        config = self._request.config
        if WORLDS not in config.stash:
            config.stash[WORLDS] = Worlds()
            config.add_cleanup(config.stash[WORLDS].close)
        return config.stash[WORLDS]

    def _enter(self, timed: dict[str, Any], base: str, results: dict[str, Comparison]) -> None:
        from bench.environment import allocator_mode, load_average

        lines = self._request.config.stash.setdefault(COMPARISONS, [])
        for name, item in timed.items():
            self.medians[name] = sorted(item.seconds)[len(item.seconds) // 2]
            extra: dict[str, Any] = {
                "cold_s": item.cold_seconds,
                "cpu_s": sorted(item.cpu_seconds)[len(item.cpu_seconds) // 2],
                "rounds_index": item.rounds,
                "load_average_1_min": load_average(),
                "allocator": allocator_mode(),
            }
            if name in results:
                extra["against"] = {"base": base, **vars(results[name])}
                lines.append(f"{self._request.node.nodeid}: {name} against {base}: {results[name]}")
            self.extra_info[name] = extra
            group = self._benchmark.group or self._request.node.nodeid
            register(self._benchmark, name, item.seconds, item.iterations, extra, group)


@pytest.fixture
def paired(request: pytest.FixtureRequest) -> Paired:
    """Compare functions in interleaved rounds: ``paired(base=f, new=g) -> Comparison``."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail("the fixture 'paired' needs the plugin pytest-benchmark, which is switched off here")
    return Paired(request, request.getfixturevalue("benchmark"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    if config.stash.get(USED, False):
        from bench.environment import machine_facts

        machine_info["perflab"] = machine_facts()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(COMPARISONS, [])
    if lines:
        terminalreporter.section("paired comparisons (new/base, 95 % interval)", sep="-")
        for line in lines:
            terminalreporter.write_line(line)
    for table in config.stash.get(TABLES, []):
        terminalreporter.write_line("")
        terminalreporter.write(table(terminalreporter._tw.fullwidth))
