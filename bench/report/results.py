"""A results file as typed data: what page, terminal and Markdown all draw from.

The file is untrusted: ``read`` takes every field out by type and complains by name. Whatever is
optional may be missing, so that half a run, or an older file, still gives a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.report.fields import Field
from bench.report.figures import read_figure
from bench.report.units import text_of
from labs.figure import Figure

FORMAT = 1  # of the "perflab" part of a results file

# A verdict is never told by colour alone: each word has its sign.
SIGNS = {
    "confirmed": "✓",
    "close": "≈",
    "off": "▲",
    "exact": "=",
    "differs": "≠",
    "not measured": "○",
    "holds": "✓",
    "fails": "✗",
    "undecidable": "?",
    "passed": "✓",
    "failed": "✗",
}


@dataclass(frozen=True)
class PredictionResult:
    """``ratio`` is measured/predicted. ``column`` is the allocator mode, "" where there is only one."""

    column: str
    variant: str
    key: str
    predicted: float | None
    measured: float | None
    low: float | None
    high: float | None
    ratio: float | None
    verdict: str
    because: str
    suspect: str
    exact: bool

    @property
    def name(self) -> str:
        """What is predicted, for a row's head: the variant, with the key where it is not its time."""
        if not self.variant:
            return self.key
        return self.variant if self.key == "time_s" else f"{self.variant} {self.key}"


@dataclass(frozen=True)
class Speedup:
    """Seconds of the group's first variant over this one's: above 1 is faster."""

    value: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class VariantResult:
    """``name`` is the variant's address without its group, which stands above the rows."""

    column: str
    name: str
    seconds: float | None
    low: float | None
    high: float | None
    cold_s: float | None
    cpu_s: float | None
    flops_per_s: float | None
    bytes_per_s: float | None
    fraction_of_roof: float | None
    rounds: int
    speedup: Speedup | None


@dataclass(frozen=True)
class Group:
    name: str
    columns: list[str]
    rows: list[VariantResult]


@dataclass(frozen=True)
class CheckResult:
    column: str
    variant: str
    error: float | None
    tolerance: float | None
    against: str
    passed: bool


@dataclass(frozen=True)
class ClaimResult:
    text: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Listing:
    """A text of several lines that a variant kept: a captured program, generated code, a message."""

    variant: str
    title: str
    text: str


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    unit: str
    help: str


@dataclass(frozen=True)
class Elsewhere:
    """A prediction for a machine that is not here; nothing measures it."""

    machine: str
    variant: str
    key: str
    predicted: float | None
    because: str


@dataclass(frozen=True)
class LabReport:
    name: str
    question: str
    answer: str
    status: str
    error: str
    command: str
    seconds: float | None
    sources: list[str]
    settings: list[Setting]
    predictions: list[PredictionResult]
    times: int
    median_abs_log2: float | None
    off: int
    elsewhere: list[Elsewhere]
    groups: list[Group]
    checks: list[CheckResult]
    claims: list[ClaimResult]
    figures: list[Figure]
    figure_error: str
    listings: list[Listing]
    unavailable: list[tuple[str, str]]

    @property
    def typical_factor(self) -> float | None:
        """The median factor between predicted and measured times: 2^median|log2|."""
        return None if self.median_abs_log2 is None else 2.0 ** min(self.median_abs_log2, 1000.0)

    def claim_count(self, verdict: str) -> int:
        return sum(claim.verdict == verdict for claim in self.claims)

    @property
    def columns(self) -> list[str]:
        """Allocator modes in the order of the predictions and groups; at most one entry: no need to say."""
        names = [prediction.column for prediction in self.predictions]
        names += [row.column for group in self.groups for row in group.rows]
        return [name for name in dict.fromkeys(names) if name]


@dataclass(frozen=True)
class Benchmark:
    """One entry of an ordinary pytest-benchmark file. Times in seconds."""

    name: str
    median: float | None
    minimum: float | None
    iqr: float | None
    rounds: int


@dataclass(frozen=True)
class MachineReport:
    """``data``: the dictionary of ``labs.machine.Machine.to_json``, or None where there is none."""

    data: dict[str, Any] | None
    name: str
    measured: bool
    measured_at: str
    facts: list[tuple[str, str]]
    constants: list[tuple[str, float | None]]


@dataclass(frozen=True)
class Report:
    """A whole results file. ``written_by_perflab``: False for a file of pytest-benchmark alone."""

    command: str
    started: str
    finished: str
    scale: str
    device: str
    machine: MachineReport
    notes: list[str]
    labs: list[LabReport]
    benchmarks: dict[str, list[Benchmark]] = field(default_factory=dict)
    written_by_perflab: bool = True


def read(results: Mapping[str, Any]) -> Report:
    """The results file's parsed JSON as a Report; ValueError that names the field which is wrong."""
    whole = Field(results)
    part = whole["perflab"]
    benchmarks = _benchmarks(whole["benchmarks"])
    if not part:
        if not whole["benchmarks"]:
            raise ValueError(
                "results: neither 'perflab' nor 'benchmarks' is in it; "
                "a file that perflab run or pytest --benchmark-json wrote is needed"
            )
        machine = MachineReport(None, "", True, "", _plain_facts(whole["machine_info"]), [])
        when = whole["datetime"].text()
        return Report("", when, "", "", "", machine, [], [], benchmarks, written_by_perflab=False)
    version = part["format"].count(FORMAT)
    if version > FORMAT:
        raise ValueError(
            f"results: perflab.format is {version}, written by a newer perflab; this one reads {FORMAT}"
        )
    labs = [read_lab(name, entry) for name, entry in part["labs"].entries()]
    return Report(
        command=part["command"].text(),
        started=part["started"].text(),
        finished=part["finished"].text(),
        scale=part["scale"].text(),
        device=part["device"].text(),
        machine=_machine(part["machine"]),
        notes=part["notes"].texts(),
        labs=labs,
        benchmarks=benchmarks if not labs else {},
    )


def _machine(machine: Field) -> MachineReport:
    return MachineReport(
        data=dict(machine.mapping()) or None,
        name=machine["name"].text(),
        measured=machine["measured"].flag(True),
        measured_at=machine["measured_at"].text(),
        facts=[(text_of(name).replace("_", " "), fact.plain()) for name, fact in machine["facts"].entries()],
        constants=[(text_of(name), value.number()) for name, value in machine["constants"].entries()],
    )


def _plain_facts(info: Field) -> list[tuple[str, str]]:
    """What pytest-benchmark noted of the machine, without its host name."""
    facts = [("processor", (info["cpu"]["brand_raw"] or info["processor"]).plain())]
    facts += [
        (name.replace("_", " "), info[name].plain()) for name in ("system", "machine", "python_version")
    ]
    return [(name, value) for name, value in facts if value]


def _benchmarks(entries: Field) -> dict[str, list[Benchmark]]:
    groups: dict[str, list[Benchmark]] = {}
    for entry in entries.items():
        stats = entry["stats"]
        benchmark = Benchmark(
            name=entry["name"].text("unnamed"),
            median=stats["median"].number(),
            minimum=stats["min"].number(),
            iqr=stats["iqr"].number(),
            rounds=stats["rounds"].count(),
        )
        groups.setdefault(entry["group"].text("without a group"), []).append(benchmark)
    return groups


def read_lab(name: str, entry: Field) -> LabReport:
    """One lab's part of the file. ``entry`` knows its path, for messages."""
    summary = entry["summary"]
    return LabReport(
        name=Field(name).text(),
        question=entry["question"].text(),
        answer=entry["answer"].text(),
        status=entry["status"].text("done"),
        error=entry["error"].text(),
        command=entry["command"].text(),
        seconds=entry["seconds"].number(),
        sources=entry["sources"].texts(),
        settings=[
            Setting(item["name"].text(), item["value"].plain(), item["unit"].text(), item["help"].text())
            for item in entry["settings"].items()
        ],
        predictions=_side_by_side([_prediction(item) for item in entry["predictions"].items()]),
        times=summary["times"].count(),
        median_abs_log2=summary["median_abs_log2"].number(),
        off=summary["off"].count(),
        elsewhere=[
            Elsewhere(
                machine=item["machine"].text("another machine"),
                variant=item["variant"].text(),
                key=item["key"].text("time_s"),
                predicted=item["predicted"].number(),
                because=item["because"].text(),
            )
            for item in entry["elsewhere"].items()
        ],
        groups=[
            Group(
                item["group"].text(),
                item["columns"].texts(),
                _side_by_side([_variant(item["group"].text(), row) for row in item["rows"].items()]),
            )
            for item in entry["groups"].items()
        ],
        checks=[
            CheckResult(
                column=item["column"].text(),
                variant=item["variant"].text(),
                error=item["error"].number(),
                tolerance=item["tolerance"].number(),
                against=item["against"].text(),
                passed=item["passed"].flag(),
            )
            for item in entry["checks"].items()
        ],
        claims=[
            ClaimResult(item["text"].text(), item["verdict"].text("undecidable"), item["why"].text())
            for item in entry["claims"].items()
        ],
        figures=[read_figure(item) for item in entry["figures"].items()],
        figure_error=entry["figure_error"].text(),
        listings=[
            Listing(item["variant"].text(), item["title"].text("untitled"), item["text"].lines())
            for item in entry["listings"].items()
        ],
        unavailable=[
            (item["variant"].text(), item["reason"].text()) for item in entry["unavailable"].items()
        ],
    )


Row = TypeVar("Row", PredictionResult, VariantResult)


def _side_by_side(rows: list[Row]) -> list[Row]:
    """Rows of one name next to each other, so that both allocator columns are read as a pair."""
    order: dict[str, int] = {}
    return sorted(rows, key=lambda row: order.setdefault(row.name, len(order)))


def _prediction(item: Field) -> PredictionResult:
    return PredictionResult(
        column=item["column"].text(),
        variant=item["variant"].text(),
        key=item["key"].text("time_s"),
        predicted=item["predicted"].number(),
        measured=item["measured"].number(),
        low=item["low"].number(),
        high=item["high"].number(),
        ratio=item["ratio"].number(),
        verdict=item["verdict"].text("not measured"),
        because=item["because"].text(),
        suspect=item["suspect"].text(),
        exact=item["exact"].flag(),
    )


def _variant(group: str, item: Field) -> VariantResult:
    speedup = item["speedup"]
    return VariantResult(
        column=item["column"].text(),
        name=item["variant"].text().removeprefix(f"{group}/"),
        seconds=item["seconds"].number(),
        low=item["low"].number(),
        high=item["high"].number(),
        cold_s=item["cold_s"].number(),
        cpu_s=item["cpu_s"].number(),
        flops_per_s=item["flops_per_s"].number(),
        bytes_per_s=item["bytes_per_s"].number(),
        fraction_of_roof=item["fraction_of_roof"].number(),
        rounds=item["rounds"].count(),
        speedup=Speedup(
            value=speedup["value"].number(),
            low=speedup["low"].number(),
            high=speedup["high"].number(),
            verdict=speedup["verdict"].text(),
        )
        if speedup
        else None,
    )
