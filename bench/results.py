"""Results files: written whole, read with complaints by name, and asked a lab's questions.

A results file is an ordinary pytest-benchmark JSON file with one more key, ``perflab``, that holds what a
report needs: predictions beside measurements, proofs, verdicts on claims, figures as data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import stats
from bench.report.units import unit_of
from bench.whole_file import write_whole
from labs.lab import Interval, Lab, Measurement, NotMeasured
from labs.machine import Machine

FORMAT = 1
CONFIRMED, CLOSE = 0.5, 1.0  # |log2(measured / predicted)|


def load(path: str | Path) -> dict[str, Any]:
    """A results file, ours or plain pytest-benchmark JSON; ValueError says what is wrong with it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ValueError(
            f"there is no file {path}" + (f"; there is {', '.join(near[:5])}" if near else "")
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; a results file is wanted") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); was its run interrupted?") from None
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ValueError(f"{path} is JSON but no benchmark results: it has no list 'benchmarks'")
    for index, entry in enumerate(data["benchmarks"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("stats"), dict) or "fullname" not in entry:
            raise ValueError(f"{path}: benchmarks[{index}] has no 'fullname' or no 'stats'")
    return data


def write(results: Mapping[str, Any], path: str | Path) -> None:
    """Write atomically; OSError when that fails."""
    write_whole(json.dumps(_finite(results)), path)


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON; they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class LabResults:
    """``labs.lab.Results`` over the benchmarks of one lab. See there for what each method means."""

    def __init__(
        self,
        lab: Lab,
        config: Any,
        machine: Machine,
        benchmarks: Sequence[Mapping[str, Any]],
        column: str | None = None,
    ) -> None:
        self.lab, self.config, self.machine = lab, config, machine
        self._all = benchmarks
        self.column = column or lab.columns[0]
        self._entries = {
            entry["extra_info"]["variant"]: entry
            for entry in benchmarks
            if entry["extra_info"].get("lab") == lab.name
            and entry["extra_info"].get("allocator") == self.column
        }

    def _entry(self, variant: str) -> Mapping[str, Any]:
        if variant not in self._entries:
            raise NotMeasured(f"{variant} was not measured here")
        return self._entries[variant]

    def variants(self, group: str | None = None) -> list[str]:
        return [name for name in self._entries if group is None or name.split("/")[0] == group]

    def has(self, *variants: str) -> bool:
        return all(variant in self._entries for variant in variants)

    def seconds(self, variant: str) -> Interval:
        return Interval(*stats.median_interval(self._entry(variant)["stats"]["data"]))

    def cold_seconds(self, variant: str) -> float:
        return float(self._entry(variant)["extra_info"]["cold_s"])

    def cpu_seconds(self, variant: str) -> float:
        return float(self._entry(variant)["extra_info"]["cpu_s"] or math.nan)

    def ratio(self, new: str, base: str) -> Interval:
        comparison = self.compare(new, base)
        return Interval(comparison.ratio, comparison.low, comparison.high)

    def compare(self, new: str, base: str) -> stats.Comparison:
        sides = [self._entry(base), self._entry(new)]
        samples = [dict(zip(s["extra_info"]["rounds_index"], s["stats"]["data"], strict=True)) for s in sides]
        common = sorted(set(samples[0]) & set(samples[1]))
        if base.split("/")[0] == new.split("/")[0] and common:
            return stats.compare_pairs([samples[0][i] for i in common], [samples[1][i] for i in common])
        return stats.compare_samples(sides[0]["stats"]["data"], sides[1]["stats"]["data"])

    def recorded(self, variant: str, name: str) -> list[float]:
        recorded = self._entry(variant)["extra_info"].get("recorded", {})
        if name in recorded:
            return list(recorded[name])
        matches = [key for key in recorded if key.rpartition("_")[0] == name]
        if len(matches) != 1:
            raise NotMeasured(
                f"{variant} recorded no {name!r}; it recorded {', '.join(recorded) or 'nothing'}"
            )
        return list(recorded[matches[0]])

    def info(self, variant: str, key: str, default: Any = None) -> Any:
        return self._entry(variant)["extra_info"].get(key, default)

    def predicted(self, variant: str, key: str = "time_s") -> float | None:
        return self._entry(variant)["extra_info"].get("predicted", {}).get(key)

    def in_column(self, allocator: str) -> LabResults:
        if allocator not in self.lab.columns:
            raise NotMeasured(f"{self.lab.name} was not measured under the {allocator} allocator")
        return LabResults(self.lab, self.config, self.machine, self._all, allocator)


def prediction_verdict(predicted: float, measured: float | None, exact: bool) -> str:
    """*confirmed* within a factor of 2^0.5, *close* within 2, else *off*; counts are *exact* or *differ*."""
    if measured is None:
        return "not measured"
    if exact:
        return "exact" if measured == predicted else "differs"
    if not (predicted > 0 and measured > 0):
        return "off"
    distance = abs(math.log2(measured / predicted))
    return "confirmed" if distance <= CONFIRMED else "close" if distance <= CLOSE else "off"


def compared_predictions(
    predictions: Mapping[str, Sequence[Mapping[str, Any]]],
    views: Mapping[str, LabResults],
    derived: Sequence[Measurement] = (),
) -> list[dict[str, Any]]:
    """Every prediction with what was measured; ``predictions`` and ``views`` are by column, ``derived`` is
    what the lab computed from several variants."""
    quantities = {item.key: item.interval for item in derived}
    rows = []
    for column, items in predictions.items():
        view = views[column]
        for item in items:
            if not item["variant"] and column != view.lab.columns[0]:
                continue  # quantities over several variants are derived once
            interval = _measured(item, view, quantities)
            measured = interval.value if interval else None
            row = {**item, "predicted": item["value"], "measured": measured}
            row["column"] = column if item["variant"] else ""
            # What is counted, or was measured once, has no interval.
            known = interval is not None and -math.inf < interval.low < interval.high < math.inf
            row["low"], row["high"] = (interval.low, interval.high) if interval and known else (None, None)
            row["ratio"] = measured / item["value"] if measured is not None and item["value"] else None
            row["verdict"] = prediction_verdict(item["value"], measured, item["exact"])
            del row["value"]
            rows.append(row)
    return rows


def _measured(item: Mapping[str, Any], view: LabResults, derived: Mapping[str, Interval]) -> Interval | None:
    if not item["variant"]:
        return derived.get(item["key"])
    if not view.has(item["variant"]):
        return None
    if item["key"] == "time_s":
        return view.seconds(item["variant"])
    by_round = view.info(item["variant"], "by_round", {}).get(item["key"])
    if by_round:
        # Of what is counted no median may hide the one round that differs.
        other = next((value for value in by_round if value != item["value"]), by_round[-1])
        return Interval.exact(other) if item["exact"] else Interval(*stats.quantity_interval(by_round))
    value = view.info(item["variant"], "measured", {}).get(item["key"])
    return None if value is None else Interval.exact(value)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How good the predicted times were: count, median |log2(measured / predicted)|, how many are off.

    Rates (``..._flop_per_s``), bytes and factors are predictions too, but no times.
    """
    timed = [r for r in rows if unit_of(r["key"]) == "s" and not r["exact"] and r["ratio"] and r["ratio"] > 0]
    distances = sorted(abs(math.log2(row["ratio"])) for row in timed)
    middle = None
    if distances:
        half = len(distances) // 2
        middle = distances[half] if len(distances) % 2 else (distances[half - 1] + distances[half]) / 2
    return {
        "times": len(distances),
        "median_abs_log2": middle,
        "off": sum(r["verdict"] == "off" for r in timed),
    }


def foretold(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Predictions that say how good the formulas are: not those that were fitted to such a measurement."""
    return [row for row in rows if not row.get("fitted")]


def group_rows(lab: Lab, views: Mapping[str, LabResults]) -> list[dict[str, Any]]:
    """Measured times by group: both allocator columns, each against the group's first variant."""
    groups: dict[str, dict[str, Any]] = {}
    for column, view in views.items():
        for address in view.variants():
            name = address.split("/")[0]
            group = groups.setdefault(name, {"group": name, "columns": [], "rows": []})
            if column not in group["columns"]:
                group["columns"].append(column)
            first = view.variants(name)[0]
            interval = view.seconds(address)
            row = {"column": column, "variant": address, "seconds": interval.value}
            row |= {
                "low": interval.low,
                "high": interval.high,
                "rounds": len(view.info(address, "rounds_index", [])),
            }
            for key in ("cold_s", "cpu_s", "flops_per_s", "bytes_per_s", "fraction_of_roof"):
                row[key] = view.info(address, key)
            row["speedup"] = None
            if address != first:
                faster = view.compare(first, address)  # base seconds / new seconds
                verdict = {"slower": "faster", "faster": "slower"}.get(faster.verdict, faster.verdict)
                row["speedup"] = {
                    "value": faster.ratio,
                    "low": faster.low,
                    "high": faster.high,
                    "verdict": verdict,
                }
            group["rows"].append(row)
    return list(groups.values())


def claim_rows(lab: Lab, view: LabResults) -> list[dict[str, str]]:
    rows = []
    for claim in lab.claims:
        why = claim.why
        try:
            held = claim.holds(view)
        except NotMeasured as error:
            held, why = None, f"{why} (undecidable here: {error.args[0]})"
        except Exception as error:
            held, why = False, f"{why} (the claim itself failed: {type(error).__name__}: {error})"
        rows.append(
            {
                "text": claim.text,
                "verdict": {True: "holds", False: "fails", None: "undecidable"}[held],
                "why": why,
            }
        )
    return rows
