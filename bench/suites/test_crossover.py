"""From which size on do our kernels beat torch's own operation? What ``kernels/crossover.json`` holds.

    pytest bench/suites/test_crossover.py --write-crossover

Each operation's benchmark case is cut along its first dimension to 1, 2, 4, ... rows; the crossover is the
smallest number of elements of the first tensor from which ours, called without a crossover, is not slower
than torch at every larger size. The forward pass decides: the backward runs what the forward chose.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.plugin import TABLES
from bench.rounds import Timed, call_cold, pairs, run_rounds, warm_up
from bench.stats import Comparison, compare_pairs
from kernels.spec import Arguments, Operation, operations, step_of

SIZES = Path(__file__).parents[2] / "kernels" / "crossover.json"
NEVER = 2**62
OPERATIONS = {operation.name: operation for operation in operations() if operation.sizes}


def cut(arguments: Arguments, rows: int) -> Arguments:
    """The arguments with the first ``rows`` rows of every tensor that has as many as the first tensor."""
    import torch

    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    length = tensors[0].shape[0]
    return {
        name: value[:rows].contiguous()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == length
        else value
        for name, value in arguments.items()
    }


def elements(arguments: Arguments) -> int:
    import torch

    return next(value for value in arguments.values() if isinstance(value, torch.Tensor)).numel()


def compare(operation: Operation, arguments: Arguments) -> Comparison:
    """torch's seconds over ours, in interleaved rounds of a fifth of a second."""
    base, new = (
        Timed(step_of(function, arguments, (), "forward"))
        for function in (operation.function, operation.eager)
    )
    for timed in (base, new):
        call_cold(timed)
        warm_up(timed, 0.05)
    run_rounds({"base": base, "new": new}, 0.2)
    return compare_pairs(*pairs(base, new))


def find(operation: Operation) -> tuple[int, list[tuple[int, float]]]:
    """(crossover in elements, [(elements, speed-up over torch)])."""
    import torch

    whole = operation.sizes[0].arguments(torch.float32)
    rows = next(value for value in whole.values() if isinstance(value, torch.Tensor)).shape[0]
    cases = [cut(whole, 2**power) for power in range(rows.bit_length()) if 2**power <= rows]
    found = [(elements(case), compare(operation, case)) for case in cases]
    crossover = NEVER
    for size, comparison in reversed(found):
        if comparison.verdict == "faster":  # torch is
            break
        crossover = size
    return crossover, [(size, comparison.ratio) for size, comparison in found]


@pytest.mark.parametrize("name", OPERATIONS)
def test_crossover(name: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: 0)
    crossover, speedups = find(OPERATIONS[name])
    shown = ", ".join(f"{size}: {speedup:.2f}" for size, speedup in speedups)
    said = f"{name}: ours from {crossover if crossover < NEVER else 'no size'} elements ({shown})\n"
    pytestconfig.stash.setdefault(TABLES, []).append(lambda width: said)
    if pytestconfig.getoption("write_crossover"):
        data = json.loads(SIZES.read_text())
        data["elements"]["cpu"][name] = crossover
        data["elements"]["cpu"] = dict(sorted(data["elements"]["cpu"].items()))
        SIZES.write_text(json.dumps(data, indent=2) + "\n")
