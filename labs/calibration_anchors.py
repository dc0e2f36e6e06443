"""How fast the machine runs now beside what its constants say.

Constants are measured once, and a processor that is shared, throttled or on battery moves. A run therefore
measures one of each kind again before each lab, in the very process that measures the lab; where one is off
by more than it scatters, all constants of its kind go with it, and this lab's predictions are made with
those. Only kinds that the lab's formulas ask for are measured: no library is loaded for their sake. Roofs,
beside which a measurement is a fraction, stay the calibrated limits.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from labs.machine import Curve, Machine

REPEATS = 3
STREAM_BYTES = 2**25  # past the caches of a core, and filled in a moment


@dataclass(frozen=True)
class Anchor:
    """A constant that is measured again for all of its kind.

    kind: what it is called in the report. constant: its name, its unit at the end. others: a pattern of the
    names that go with it. measure: its value now, in some milliseconds.
    """

    kind: str
    constant: str
    others: str
    measure: Callable[[], float]

    def asked_for(self, names: Collection[str]) -> bool:
        return any(self.goes_with(name) for name in names)

    def goes_with(self, name: str) -> bool:
        return re.fullmatch(self.others, name) is not None


def _anchors() -> tuple[Anchor, ...]:
    from labs import calibration_calls as calls
    from labs import calibration_hardware as hardware

    runs = 5
    return (
        Anchor(
            "the interpreter",
            "python_operation_s",
            r"python_\w+_s|pickle_item_s",
            lambda: calls.python_operation(runs),
        ),
        Anchor(
            "NumPy's calls",
            "numpy_call_s",
            r"numpy_\w*(call|loop|row|conversion)_s",
            lambda: calls.numpy_call(runs),
        ),
        Anchor(
            "torch's calls",
            "torch_call_s",
            r"torch_\w*call_s|torch_compiled_\w+_s|torch_capture_s|torch_backward_s|torch_func_entry_s",
            lambda: calls.torch_call(runs),
        ),
        Anchor(
            "JAX's calls",
            "jax_call_s",
            r"jax_\w*call_s|jax_array_s|jax_compile\w*_s",
            lambda: calls.jax_call(runs),
        ),
        Anchor(
            "arithmetic",
            "vector_float32_1_flops",
            r"\w+_flops|\w+_latency_s|packed_\w+_s|\w+_exp_s|jax_kernel_s",
            hardware.vector_rate,
        ),
        Anchor(
            "memory",
            "copy_1",
            r"(copy|read)_\w+",
            lambda: hardware.bandwidths(1, [STREAM_BYTES], 3)["copy"][0],
        ),
    )


def speeds(
    machine: Machine, asked: Collection[str], anchors: Collection[Anchor] | None = None
) -> dict[str, float]:
    """Kind -> its speed now over that of its constants, where it differs by more than it scatters.

    asked: names of constants and curves; kinds with none of them are not measured, nor what has no constant.
    """
    found = {}
    for anchor in _anchors() if anchors is None else anchors:
        then = _then(machine, anchor.constant)
        if then is None or not anchor.asked_for(asked):
            continue
        is_time = anchor.constant.endswith("_s")
        ratios = [then / now if is_time else now / then for now in (anchor.measure() for _ in range(REPEATS))]
        middle = statistics.median(ratios)
        if abs(middle - 1) > max(ratios) - min(ratios):
            found[anchor.kind] = middle
    return found


def _then(machine: Machine, name: str) -> float | None:
    curve = machine.curves.get(name)
    return curve.at(STREAM_BYTES) if curve else machine.get(name)


def at_speeds(
    machine: Machine, found: Mapping[str, float], anchors: Collection[Anchor] | None = None
) -> Machine:
    """The machine whose constants have changed by what ``speeds`` found of their kind."""
    if not found:
        return machine
    constants, curves = dict(machine.constants), dict(machine.curves)
    for anchor in _anchors() if anchors is None else anchors:
        speed = found.get(anchor.kind, 1.0)
        for name in filter(anchor.goes_with, machine.constants):
            constants[name] = constants[name] / speed if name.endswith("_s") else constants[name] * speed
        for name in filter(anchor.goes_with, machine.curves):
            curves[name] = _beyond(machine, curves[name], speed)
    return replace(machine, constants=constants, curves=curves)


def _beyond(machine: Machine, curve: Curve, speed: float) -> Curve:
    """What a core's own caches do not hold: only there was the rate measured again."""
    own = machine.get("l2_bytes") or 0.0
    pairs = zip(curve.working_set_bytes, curve.bytes_per_second, strict=True)
    rates = [rate * (speed if size > own * machine.cores else 1.0) for size, rate in pairs]
    return Curve(curve.working_set_bytes, rates)


def said(found: Iterable[Mapping[str, float]]) -> str:
    """For the report: what ran at another speed than its constants, from its least to its greatest of several
    checks; ``""`` where nothing did."""
    kinds: dict[str, list[float]] = {}
    for speeds in found:
        for kind, speed in speeds.items():
            kinds.setdefault(kind, []).append(speed)
    parts = []
    for kind, row in kinds.items():
        least, greatest = f"{min(row):.2f}", f"{max(row):.2f}"
        parts.append(f"{kind} at {least if least == greatest else f'{least} to {greatest}'}x")
    return f"{', '.join(parts)} of the calibrated speed" if parts else ""


class Asked(dict[str, Any]):
    """Constants or curves that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def asked_of(machine: Machine, ask: Callable[[Machine], object]) -> set[str]:
    """Names of the constants and curves that ``ask`` takes from the machine."""
    constants, curves = Asked(machine.constants), Asked(machine.curves)
    ask(replace(machine, constants=constants, curves=curves))
    return {name for name in constants.names | curves.names if name in constants or name in curves}
