"""Two results files side by side: what became slower, what faster, what cannot be told."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.stats import Comparison, compare_samples

UNPAIRED = (
    "The runs were not interleaved: what else changed on the machine between them counts as a difference. "
    "The fixture paired, and the variants of one run, are free of that."
)


@dataclass(frozen=True)
class Row:
    """One benchmark in both files. [0, inf] is the interval where there is none, and the note says why."""

    name: str
    base_seconds: float
    new_seconds: float
    ratio: float
    low: float
    high: float
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class FileComparison:
    rows: list[Row]
    added: list[str]
    removed: list[str]
    warnings: list[str]

    def sentence(self) -> str:
        """What happened, in one sentence."""
        count = len(self.rows)
        if not count:
            return "no benchmark is in both files"
        parts = []
        for verdict in ("slower", "faster", "same", "undecidable"):
            number = sum(row.verdict == verdict for row in self.rows)
            if number:
                parts.append(f"all {number} {verdict}" if number == count else f"{number} {verdict}")
        text = f"{count} compared: {', '.join(parts)}"
        slower = [row for row in self.rows if row.verdict == "slower"]
        if slower:
            worst = max(slower, key=lambda row: row.low)
            text += f"; most of all {worst.name}, {(worst.ratio - 1) * 100:+.0f} %"
        return text

    def above(self, limit: float) -> list[Row]:
        """Rows whose interval lies above 1 + limit as a whole."""
        return [row for row in self.rows if row.low > 1 + limit]

    def gate(self, limit: float) -> str:
        """What the gate held and what it could not hold, in one line."""
        untold = sum(row.low <= 1 + limit < row.high for row in self.rows)
        text = f"{len(self.above(limit))} of {len(self.rows)} slower by more than {limit * 100:g} %"
        text += f"; {untold} cannot be told" if untold else ""
        return text + (f"; {len(self.removed)} only in base, not compared" if self.removed else "")


def parse_share(text: str, option: str = "--fail-above") -> float:
    """``5%`` or ``0.05`` as 0.05; ValueError that names the option otherwise."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{option} takes a share such as 5%, not {text!r}")
    return value


def two_files(words: Sequence[str], last: int = 0) -> tuple[Path, Path]:
    """(base, new): two paths, or with ``last`` the first and the last of a lab's newest results here."""
    if last:
        from bench.history import last as newest

        if last < 2 or len(words) != 1:
            raise ValueError(
                "compare --last takes a number from 2 on and one lab: perflab compare --last 2 roofline"
            )
        found = newest(last, words[0])
        return found[0], found[-1]
    if len(words) != 2:
        raise ValueError(
            f"compare takes BASE and NEW, two results files or two profiler reports, not {len(words)}"
        )
    return Path(words[0]), Path(words[1])


def compare_results(
    base: Path, new: Path, *, limit: float | None = None, as_json: bool = False, markdown: bool = False
) -> int:
    """Prints the comparison of two results files; 1 if something is slower by more than ``limit``, else 0.

    ValueError where a limit is given and nothing in the files has an interval that could be held to it.
    """
    from bench.results import load

    comparison = compare_files(load(base), load(new))
    if as_json:
        print(json.dumps(to_json(comparison), indent=1))
    elif markdown:
        print(to_markdown(comparison))
    else:
        print_comparison(comparison)
    if limit is None:
        return 0
    if not comparison.rows:
        raise ValueError("no benchmark is in both files: nothing that --fail-above could hold")
    if not any(math.isfinite(row.high) for row in comparison.rows):
        notes = "; ".join(dict.fromkeys(row.note for row in comparison.rows if row.note))
        raise ValueError(f"no benchmark has an interval that --fail-above could hold: {notes}")
    print(comparison.gate(limit), file=sys.stderr)
    return 1 if comparison.above(limit) else 0


def compare_files(base: Mapping[str, Any], new: Mapping[str, Any]) -> FileComparison:
    """Compare by full name. Both arguments as ``bench.results.load`` returns them."""
    before = {entry["fullname"]: entry for entry in base["benchmarks"]}
    after = {entry["fullname"]: entry for entry in new["benchmarks"]}
    other = _other_settings(base, new)
    rows = []
    for name, entry in before.items():
        if name in after:
            row = _row(name, entry["stats"], after[name]["stats"])
            lab = _at(entry, ("extra_info", "lab"))
            note = f"other settings of {lab}" if lab in other else ""
            if note:
                row = replace(row, low=0.0, high=math.inf, verdict="undecidable", note=note)
            rows.append(row)
    return FileComparison(
        rows,
        [name for name in after if name not in before],
        [name for name in before if name not in after],
        _warnings(base, new),
    )


def _row(name: str, base: Mapping[str, Any], new: Mapping[str, Any]) -> Row:
    try:
        seconds = float(base["median"]), float(new["median"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no median in its stats") from None
    if not all(math.isfinite(value) and value > 0 for value in seconds):
        return Row(name, *seconds, math.nan, 0.0, math.inf, "undecidable", "a median is not positive")
    if base == new:
        return Row(name, *seconds, 1.0, 1.0, 1.0, "same", "identical measurements")
    data = base.get("data"), new.get("data")
    if not (data[0] and data[1]):
        note = "only summaries were saved: use --benchmark-save-data"
        return Row(name, *seconds, seconds[1] / seconds[0], 0.0, math.inf, "undecidable", note)
    try:
        comparison: Comparison = compare_samples(data[0], data[1])
    except ValueError as error:
        return Row(name, *seconds, seconds[1] / seconds[0], 0.0, math.inf, "undecidable", str(error))
    few = f"only {min(len(data[0]), len(data[1]))} rounds" if comparison.high == math.inf else ""
    return Row(name, *seconds, comparison.ratio, comparison.low, comparison.high, comparison.verdict, few)


def _warnings(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes the two files hard to hold against each other."""
    first, second = base.get("machine_info") or {}, new.get("machine_info") or {}
    warnings = []
    for what, path in {
        "machines": ("perflab", "fingerprint"),
        "processors": ("cpu", "brand_raw"),
        "Python versions": ("python_version",),
        "library versions": ("perflab", "versions"),
    }.items():
        values = [_at(first, path), _at(second, path)]
        if None not in values and values[0] != values[1]:
            warnings.append(f"different {what}: {_difference(values[0], values[1])}")
    scales = [(_at(data, ("perflab", "scale"))) for data in (base, new)]
    if None not in scales and scales[0] != scales[1]:
        warnings.append(f"different sizes: {scales[0]} and {scales[1]}")
    warnings += [f"different settings of {name}: {text}" for name, text in _other_settings(base, new).items()]
    return warnings


def _other_settings(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The labs of both files that ran with other settings, which is other work, and what differs."""
    labs = [_at(data, ("perflab", "labs")) for data in (base, new)]
    if not all(isinstance(each, Mapping) for each in labs):
        return {}
    found = {}
    for name in labs[0]:
        if name in labs[1]:
            settings = [_settings(each[name]) for each in labs]
            if settings[0] != settings[1]:
                found[name] = _difference(settings[0], settings[1])
    return found


def _settings(lab: Any) -> dict[str, Any]:
    """A lab's settings by name; of a damaged file, those that are whole."""
    settings = _at(lab, ("settings",))
    if not isinstance(settings, list):
        return {}
    return {str(item["name"]): item.get("value") for item in settings if _at(item, ("name",)) is not None}


def _at(data: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _difference(first: Any, second: Any) -> str:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in keys)
    return f"{first} and {second}"


def to_json(comparison: FileComparison) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "sentence": comparison.sentence(),
        "rows": [{key: finite(value) for key, value in vars(row).items()} for row in comparison.rows],
        "added": comparison.added,
        "removed": comparison.removed,
        "warnings": comparison.warnings,
        "note": UNPAIRED,
    }


def short_name(fullname: str) -> str:
    """``add/torch`` of ``…::test_lab[add/torch]``; of other names what stands behind ``::``."""
    tail = fullname.split("::", 1)[-1]
    return tail[len("test_lab[") : -1] if tail.startswith("test_lab[") and tail.endswith("]") else tail


def interval_text(row: Row) -> str:
    return f"[{row.low:.3f}, {row.high:.3f}]" if math.isfinite(row.high) else "unknown"


def to_markdown(comparison: FileComparison) -> str:
    from bench.report.units import format_seconds

    lines = [f"**{comparison.sentence()}**", ""]
    lines += [f"- warning: {warning}" for warning in comparison.warnings]
    lines += [
        "",
        "| benchmark | base | new | new/base | 95 % interval | verdict |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in sorted(comparison.rows, key=lambda row: -row.low):
        cells = [
            f"`{short_name(row.name).replace('|', '/').replace('`', '')}`",
            format_seconds(row.base_seconds),
        ]
        cells += [format_seconds(row.new_seconds), f"{row.ratio:.3f}", interval_text(row)]
        cells.append(row.verdict + (f" ({row.note})" if row.note else ""))
        lines.append(f"| {' | '.join(cells)} |")
    for what, names in (("only in new", comparison.added), ("only in base", comparison.removed)):
        lines += [f"- {what}: `{short_name(name)}`" for name in names]
    return "\n".join([*lines, "", UNPAIRED]) + "\n"


def print_comparison(comparison: FileComparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bench.report.units import format_seconds

    console = Console()
    console.print(comparison.sentence(), style="bold", markup=False)
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("benchmark", overflow="fold")
    for header in ("base", "new", "new/base", "95 % interval"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    style = {"slower": "red", "faster": "green", "undecidable": "yellow"}
    for row in sorted(comparison.rows, key=lambda row: -row.low):
        table.add_row(
            escape(short_name(row.name)),
            format_seconds(row.base_seconds),
            format_seconds(row.new_seconds),
            f"{row.ratio:.3f}",
            interval_text(row),
            row.verdict + (f" ({escape(row.note)})" if row.note and row.verdict == "undecidable" else ""),
            style=style.get(row.verdict),
        )
    console.print(table)
    for what, names in (("only in new", comparison.added), ("only in base", comparison.removed)):
        for name in names:
            console.print(f"{what}: {short_name(name)}", markup=False)
    console.print(UNPAIRED, style="dim", markup=False)
