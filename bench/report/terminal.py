"""A lab's results on a terminal, or in a log: nothing here needs colour or more than 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench.report.fields import Field
from bench.report.lines import encodable, new_table, print_line
from bench.report.results import SIGNS, Group, LabReport, read_lab
from bench.report.units import NOTHING, format_interval, format_ratio, format_seconds, format_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from labs.machine import Machine

_STYLES = {
    "confirmed": "green",
    "exact": "green",
    "holds": "green",
    "close": "yellow",
    "undecidable": "yellow",
    "off": "bold red",
    "differs": "bold red",
    "fails": "bold red",
    "failed": "bold red",
    "faster": "green",
    "slower": "red",
}


def print_lab(lab: Mapping[str, Any], console: Console, name: str = "") -> None:
    """Prints one entry of ``results["perflab"]["labs"]``: question, predictions, speeds, claims.

    name: the lab's name, for the heading. ValueError that names the field when the entry is malformed.
    """
    report = read_lab(name, Field(lab, f"perflab.labs.{name}" if name else "lab"))
    many = len(report.columns) > 1
    print_line(console, report.question or name, "bold", before=1)
    if report.status != "done" or report.error:
        print_line(console, f"{report.status}: {report.error}".rstrip(": "), "bold red")
    if report.predictions:
        console.print(_predictions(report, many, console))
        _print_counted(console, report)
        _print_suspects(console, report)
    for group in report.groups:
        console.print()
        console.print(_group(group, many, console))
    failed = [check for check in report.checks if not check.passed]
    for check in failed:
        limit = f"error {_plain(check.error)} exceeds {_plain(check.tolerance)}"
        print_line(console, f"check failed: {check.variant} {limit} against {check.against}", "bold red")
    if report.checks and not failed:
        print_line(console, f"proof: all {len(report.checks)} results agree with their reference")
    for claim in report.claims:
        print_line(
            console, f"{sign(claim.verdict, console)} {claim.text}", _STYLES.get(claim.verdict, ""), indent=2
        )
        if claim.verdict != "holds":
            why = f"{claim.verdict}: {claim.why}" if claim.why else claim.verdict
            print_line(console, why, "dim", indent=4)
    if report.figure_error:
        print_line(console, f"no figure: {report.figure_error}", "dim")
    for item in report.elsewhere:
        shown = format_value(item.key, item.predicted) if item.key else "no prediction"
        where = f"{item.variant or item.key} on {item.machine}, not measured"
        print_line(console, f"{where}: {shown} ({item.because})", "dim")
    for variant, reason in report.unavailable:
        print_line(console, f"not run: {variant}: {reason}", "dim")


def sign(verdict: str, console: Console) -> str:
    """The verdict's sign, or a word of plain letters where the output cannot show it."""
    text = SIGNS.get(verdict, "?")
    plain = {"holds": "ok", "fails": "FAILS", "confirmed": "ok", "off": "!"}
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return plain.get(verdict, "?")
    return text


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _predictions(report: LabReport, many: bool, console: Console) -> Table:
    """Predictions under their groups' names; counted quantities are printed apart."""
    from rich.text import Text

    columns = [("prediction", False)] + ([("malloc", False)] if many else [])
    columns += [("predicted", True), ("measured [95 %]", True), ("ratio", True), ("verdict", False)]
    table = new_table("", console, *columns)
    group, last = "", ""
    for item in report.predictions:
        if item.exact:
            continue
        own, slash, name = item.name.partition("/")
        if slash and own != group:
            table.add_row(Text(encodable(own, console), style="bold"))
        group = own if slash else ""
        shown = "" if item.name == last else " " + name if slash else item.name
        last = item.name
        cells = [Text(encodable(shown, console))] + ([Text(encodable(item.column, console))] if many else [])
        cells += [
            Text(format_value(item.key, item.predicted)),
            Text(format_interval(item.key, item.measured, item.low, item.high)),
            Text(format_ratio(item.ratio)),
            Text(encodable(item.verdict, console), style=_STYLES.get(item.verdict, "")),
        ]
        table.add_row(*cells)
    return table


def _print_counted(console: Console, report: LabReport) -> None:
    for item in report.predictions:
        if item.exact:
            predicted = format_value(item.key, item.predicted, exact=True)
            measured = format_value(item.key, item.measured, exact=True)
            where = f" ({item.column})" if item.column else ""
            text = f"{item.name}{where}: predicted {predicted}, counted {measured}: {item.verdict}"
            print_line(
                console, text, "" if item.verdict == "exact" else _STYLES.get(item.verdict, ""), indent=1
            )


def _print_suspects(console: Console, report: LabReport) -> None:
    if report.typical_factor is not None:
        text = f"{report.times} times predicted, half of them within {format_ratio(report.typical_factor)}"
        print_line(console, text + (f"; {report.off} off by more than 2x" if report.off else ""))
    seen = set()
    for item in report.predictions:
        if item.verdict in ("off", "differs") and (item.name, item.suspect) not in seen:
            seen.add((item.name, item.suspect))
            print_line(console, f"{item.name}: {item.suspect or 'no suspect was named'}", indent=2)


def _group(group: Group, many: bool, console: Console) -> Table:
    from rich.text import Text

    columns = [("way", False)] + ([("malloc", False)] if many else [])
    columns += [("time [95 %]", True), ("vs first", True), ("cold", True), ("of limit", True)]
    table = new_table(group.name, console, *columns)
    last = None
    for row in group.rows:
        speed = row.speedup
        against = format_ratio(speed.value) + f" {speed.verdict}".rstrip() if speed else NOTHING
        name = "" if row.name == last else row.name
        last = row.name
        cells = [Text(encodable(name, console))] + ([Text(encodable(row.column, console))] if many else [])
        cells += [
            Text(format_interval("time_s", row.seconds, row.low, row.high)),
            Text(encodable(against, console), style=_STYLES.get(speed.verdict, "") if speed else ""),
            Text(format_seconds(row.cold_s)),
            Text(format_value("roof_fraction", row.fraction_of_roof)),
        ]
        table.add_row(*cells)
    return table


def print_machine(machine: Machine, console: Console) -> None:
    """A machine's constants with their units and how each was found, and its bandwidth curves."""
    from rich.table import Table

    print_line(console, machine.name + ("" if machine.measured else " (not measured)"), "bold", before=1)
    table = Table(box=None, pad_edge=False)
    for header in ("constant", "value", "how it was found"):
        table.add_column(header, justify="right" if header == "value" else "left", overflow="fold")
    for name, value in machine.constants.items():
        table.add_row(name, format_value(name, value), machine.sources.get(name, ""))
    console.print(table)
    for name, curve in machine.curves.items():
        points = zip(curve.working_set_bytes, curve.bytes_per_second, strict=True)
        text = ", ".join(
            f"{format_value('rate_bytes_per_s', rate)} at {format_value('size_bytes', size)}"
            for size, rate in points
        )
        print_line(console, f"bandwidth {name}: {text}")
    for name, reason in machine.facts.get("left_out", {}).items():
        print_line(console, f"left out: {name}: {reason}", "yellow")
    for doubt in machine.facts.get("doubts", []):
        print_line(console, f"doubtful: {doubt}", "bold red")
    if machine.gpu is not None:
        print_machine(machine.gpu, console)
    elif "gpu" in machine.facts:
        print_line(console, f"GPU: {machine.facts['gpu']}", "dim")
    if "sweeps" in machine.facts:
        took = (
            f"measured {machine.facts['sweeps']} times over in {machine.facts.get('calibrated_in', NOTHING)}"
        )
        print_line(console, took, "dim")
