"""Every way of running returns what the plain loop returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labs.concurrency import compute, hazards, moving, timeline, workers
from labs.concurrency.config import PAYLOAD_ITERATIONS, Config
from labs.lab import Check


def check(config: Config, outputs: Mapping[str, object]) -> Sequence[Check]:
    """One Check an output; error 0 means equal to the last bit (a sum of two has one rounding)."""
    found = []
    expected: dict[str, Any] = {}
    for address, output in outputs.items():
        group, name = address.split("/")
        if group in ("python_work", "numpy_work", "numba_work", "waiting", "many_waits"):
            if group not in expected:
                expected[group] = compute.reference(config, group)
            found.append(_equal(address, output, expected[group], "the same tasks one after the other"))
        elif group == "per_task":
            found.append(_equal(address, output, list(range(config.tiny_tasks)), "the items in their order"))
        elif group == "start_up":
            found.append(_equal(address, output, list(range(config.pool)), "one answer a worker"))
        elif group in ("transfer", "combine"):
            found.append(_array(config, address, output))
        elif group == "crossover_task":
            iterations = int(name.rsplit("_", 1)[1])
            reference = [workers.python_work(iterations)] * config.sweep_tasks
            found.append(_equal(address, output, reference, "the same tasks one after the other"))
        elif group == "crossover_payload":
            found.append(_echoes(config, address, output))
        elif group == timeline.GROUP:
            found.append(_equal(address, output, timeline.PIECES * timeline.shown(config), "pieces counted"))
        elif address == hazards.VARIANT:
            names = [hazard.name for hazard in _hazards(output)]
            found.append(_equal(address, names, [s.name for s in hazards.SCENARIOS], "each scenario once"))
    return found


def _hazards(output: object) -> Sequence[hazards.Hazard]:
    return output if isinstance(output, list) else []


def _equal(address: str, output: object, expected: object, against: str) -> Check:
    return Check(address, 0.0 if output == expected else float("nan"), 0.0, against)


def _array(config: Config, address: str, output: Any) -> Check:
    import numpy as np

    if address.startswith("combine/"):
        arrays = [moving.payload(config, seed).astype(np.float64) for seed in range(config.ranks)]
        expected = np.sum(arrays, axis=0)
        # Each of the additions, in any order, rounds once to float32 (Higham 2002, section 4.2).
        tolerance = config.ranks * 2.0**-24 * float(np.max(np.sum(np.abs(arrays), axis=0)))
        against = "the sum of all arrays in float64"
    else:
        expected, against, tolerance = -moving.payload(config), "the array with its sign turned", 0.0
        if address.endswith("_resident"):
            expected, against = expected[:: moving.SAMPLE], f"{against}, every {moving.SAMPLE}th item"
    found = np.asarray(output)
    if found.shape != expected.shape:
        return Check(address, float("nan"), tolerance, against)
    return Check(address, float(np.max(np.abs(found - expected))), tolerance, against)


def _echoes(config: Config, address: str, output: Any) -> Check:
    import numpy as np

    size = int(address.rsplit("_", 1)[1])
    sent = moving.echo_arrays(config, size)
    good = len(output) == len(sent) and all(
        value == workers.python_work(PAYLOAD_ITERATIONS, float(array[0])) and np.array_equal(back, array)
        for (value, back), array in zip(output, sent, strict=False)
    )
    return Check(
        address, 0.0 if good else float("nan"), 0.0, "the payload as it was sent, and the work's result"
    )
