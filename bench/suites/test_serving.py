"""The serving engine beside ``generate`` of transformers: tokens a second at eight requests at once.

    pip install 'perflab[transformers]'
    pytest bench/suites/test_serving.py [--quick]

Both have the same weights, requests and cores, and write the same tokens, which is checked first. Each
configuration of ``generate`` is a line; the fastest of them is the one that counts. Requests of equal lengths
favour it: nothing is padded and nobody waits for the longest. A quick run leaves these out, and what is
compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.plugin import Paired
from bench.suites import serving_peer
from bench.suites.lines import Line, gathered, table

AIM = 1.5


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[Line]:
    return gathered(pytestconfig, render)


def render(lines: list[Line], width: int) -> str:
    return table(lines, width, title="serving, 8 requests at once (peer / ours)", ratio="ratio", digits=2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "load" in metafunc.fixturenames:
        quick = metafunc.config.getoption("perflab_scale") == "quick"
        metafunc.parametrize("load", ["mixed"] if quick else list(serving_peer.LOADS))


@pytest.fixture(scope="module", autouse=True)
def two_cores() -> Iterator[None]:
    """Each configuration of the peer sets its threads; these and all processes end with the module."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    serving_peer.close()


@pytest.mark.timeout(900)  # some take seconds a round
def test_generate(load: str, paired: Paired, lines: list[Line], pytestconfig: pytest.Config) -> None:
    pytest.importorskip("transformers", reason="pip install 'perflab[transformers]'")
    quick = pytestconfig.getoption("perflab_scale") == "quick"
    configurations = [
        name for name, each in serving_peer.CONFIGURATIONS.items() if not (quick and each.compiled)
    ]
    functions: dict[str, Any] = {"ours": serving_peer.ours(load)}
    for name in configurations:
        functions[name] = serving_peer.theirs(load, name)
    written = {name: function() for name, function in functions.items()}
    for name in configurations:
        assert agreeing(written["ours"], written[name]) >= 0.9, f"{name} writes other tokens"
    found: Any = paired(**functions)
    fastest = min(configurations, key=lambda name: paired.medians[name])
    rate = serving_peer.tokens_of(load) / paired.medians["ours"]
    for name, ratio in found.items():
        aim = AIM if name == fastest else None
        what = f"{load} lengths, {rate:.0f} tokens/s"
        lines.append(Line(what, f"generate, {name}", ratio.ratio, ratio.low, ratio.high, aim))


def agreeing(mine: dict[int, list[int]], other: dict[int, list[int]]) -> float:
    """Share of requests with the same tokens: padding changes the order of sums, and two tokens may be as
    likely but for rounding."""
    return sum(other[number] == tokens for number, tokens in mine.items()) / len(mine)
