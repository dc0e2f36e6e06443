"""A machine and results with numbers that a test states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from labs.lab import Claim, Interval, NotMeasured, Results
from labs.machine import Curve, Machine

# Messages over gloo, of processes of this host.
GLOO = {
    "gloo_message_s": 1e-4, "gloo_s_per_byte": 5e-10,
    "gloo_exchange_s": 2e-4, "gloo_exchange_s_per_byte": 8e-10,
    "thread_switch_s": 25e-6,
}  # fmt: skip


def machine(**constants: float) -> Machine:
    """Two cores; one reads 10 GB/s from memory and copies 8, both twice that; caches: four times as fast."""
    sizes = (8e6, 16e6)
    curves = {
        f"{kind}_{suffix}": Curve(sizes, (4 * rate, rate))
        for kind, one in (("read", 10e9), ("copy", 8e9))
        for suffix, rate in (("1", one), ("all", 2 * one))
    }
    values = {
        "cores": 2.0, "l1d_bytes": 32e3, "l2_bytes": 1e6, "l3_bytes": 8e6, "torch_call_s": 1e-6,
        "torch_parallel_region_s": 2e-6, "page_fault_all_s_per_byte": 0.5e-9, "page_fault_s_per_byte": 0.5e-9,
        "vector_float32_1_flops": 50e9, "vector_float32_all_flops": 100e9,
        "matrix_bfloat16_1_flops": 100e9, "matrix_bfloat16_all_flops": 200e9,
    }  # fmt: skip
    return Machine("two cores", True, values | constants, curves)


FLAT = Curve((1e6, 2e6), (16e9, 16e9))


def linked(**constants: float) -> Machine:
    """The stated machine with links, and with one bandwidth whatever the size: then all-reduces are lines."""
    curves = dict.fromkeys(("read_1", "copy_1", "read_all", "copy_all"), FLAT)
    return replace(machine(**GLOO, torch_woken_call_s=2e-6, **constants), curves=curves)


def decision(claim: Claim, results: Results) -> bool | None:
    """As in a report: what was not measured decides nothing."""
    try:
        return claim.holds(results)
    except NotMeasured:
        return None


@dataclass
class Stated:
    """Results with times that a test states, 2 % wide intervals, and recorded values, one or a list. What is
    not stated was not measured, as in results of a run."""

    config: Any
    machine: Machine
    columns: Mapping[str, Mapping[str, float]]
    column: str = "default"
    values: Mapping[tuple[str, str], float | Sequence[float]] = field(default_factory=dict)

    @property
    def times(self) -> Mapping[str, float]:
        return self.columns.get(self.column, {})

    def _time(self, variant: str) -> float:
        if variant not in self.times:
            raise NotMeasured(f"{variant} has no {self.column} time")
        return self.times[variant]

    def variants(self, group: str | None = None) -> Sequence[str]:
        return [each for each in self.times if group in (None, each.split("/")[0])]

    def has(self, *variants: str) -> bool:
        return all(each in self.times for each in variants)

    def seconds(self, variant: str) -> Interval:
        value = self._time(variant)
        return Interval(value, 0.99 * value, 1.01 * value)

    def ratio(self, new: str, base: str) -> Interval:
        value = self._time(new) / self._time(base)
        return Interval(value, 0.98 * value, 1.02 * value)

    def predicted(self, variant: str, key: str = "time_s") -> float | None:
        return self._time(variant)

    def recorded(self, variant: str, name: str) -> Sequence[float]:
        values = self.values.get((variant, name), ())
        if not self.has(variant) or (not values and values != 0):
            raise NotMeasured(f"{variant} recorded no {name!r}")
        return values if isinstance(values, Sequence) else [values]

    def in_column(self, allocator: str) -> "Stated":
        return replace(self, column=allocator)
