"""Results as Markdown, for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.results import SIGNS, Group, LabReport, Report, read
from bench.report.units import (
    NOTHING,
    format_interval,
    format_ratio,
    format_seconds,
    format_value,
)


def to_markdown(results: Mapping[str, Any]) -> str:
    """A results file's parsed JSON as Markdown; ValueError that names the field which is wrong."""
    report = read(results)
    lines = ["## perflab", ""]
    facts = (report.machine.name, report.device, report.scale, report.finished or report.started)
    lines += [", ".join(escape(fact) for fact in facts if fact), ""] if any(facts) else []
    if report.command:
        lines += [code(report.command), ""]
    lines += [f"> {escape(note)}\n" for note in report.notes]
    if not report.written_by_perflab:
        lines += [
            "Written by pytest-benchmark without perflab: no predictions, proofs or claims are in it.",
            "",
        ]
    lines += _overview(report) if len(report.labs) > 1 else []
    for lab in report.labs:
        lines += _lab(lab)
    for group, benchmarks in report.benchmarks.items():
        rows = [
            (code(item.name), *map(format_seconds, (item.median, item.minimum, item.iqr)), str(item.rounds))
            for item in benchmarks
        ]
        lines += [f"### {escape(group)}", ""]
        lines += table_lines(
            ("benchmark", "median", "minimum", "interquartile range", "rounds"), "lrrrr", rows
        )
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no table cell, nobody notified."""
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"^(\s*)([-+=]|\d+(?=[.)]))", lambda found: f"{found[1]}{_not_a_list(found[2])}", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A zero-width space breaks "@name", "#12" and bare addresses, which a forge would link or notify.
    return re.sub(r"[@#]|://|(?<=www)\.", lambda found: f"{found[0]}\u200b", text)


def _not_a_list(start: str) -> str:
    return f"\\{start}" if start in "-+=" else f"{start}\u200b"


def code(text: str) -> str:
    """Text as a code span: a backtick cannot end it, and a pipe cannot end a table's cell."""
    text = text.replace("`", "'").replace("|", "\\|").strip()
    return f"`{text or ' '}`"


def table_lines(header: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["--:" if letter == "r" else "---" for letter in align]
    table = [header, rule, *rows]
    return ["| " + " | ".join(row) + " |" for row in table] + [""]


def _overview(report: Report) -> list[str]:
    rows = []
    for lab in report.labs:
        typical = f"{format_ratio(lab.typical_factor)} (of {lab.times})" if lab.times else NOTHING
        counts = [lab.claim_count(verdict) for verdict in ("holds", "fails", "undecidable")]
        rows.append((code(lab.name), escape(lab.question), typical, str(lab.off), *map(str, counts)))
    header = ("lab", "question", "typical factor", "off", "claims held", "failed", "undecidable")
    return table_lines(header, "llrrrrr", rows)


def _lab(lab: LabReport) -> list[str]:
    many = len(lab.columns) > 1
    lines = [f"### {escape(lab.question or lab.name)}", ""]
    lines += [escape(lab.answer), ""] if lab.answer else []
    if lab.status != "done" or lab.error:
        lines += [f"**{escape(lab.status)}** {escape(lab.error)}", ""]
    if lab.predictions:
        lines += _predictions(lab, many)
    for claim in lab.claims:
        lines.append(f"- {SIGNS.get(claim.verdict, '?')} **{escape(claim.verdict)}**: {escape(claim.text)}")
        if claim.verdict == "fails" and claim.why:
            lines.append(f"  {escape(claim.why)}")
    lines += [""] if lab.claims else []
    for group in lab.groups:
        lines += _group(group, many)
    if lab.checks:
        failed = [check.variant for check in lab.checks if not check.passed]
        text = f"{len(lab.checks) - len(failed)} of {len(lab.checks)} results agree with their reference."
        wrong = f" Wrong: {', '.join(map(code, failed))}." if failed else ""
        lines += [f"Proof: {text}{wrong}", ""]
    lines += [f"- no figure: {escape(lab.figure_error)}"] if lab.figure_error else []
    lines += [f"- not run: {code(variant)}: {escape(reason)}" for variant, reason in lab.unavailable]
    lines += [""] if lab.unavailable or lab.figure_error else []
    return lines + ([f"Run it again: {code(lab.command)}", ""] if lab.command else [])


def _predictions(lab: LabReport, many: bool) -> list[str]:
    header = (
        "prediction",
        *(("allocator",) if many else ()),
        "predicted",
        "measured [95 %]",
        "ratio",
        "verdict",
    )
    rows = []
    for item in lab.predictions:
        measured = (
            format_value(item.key, item.measured, exact=True)
            if item.exact
            else format_interval(item.key, item.measured, item.low, item.high)
        )
        predicted = format_value(item.key, item.predicted, exact=item.exact)
        verdict = f"{SIGNS.get(item.verdict, '?')} {escape(item.verdict)}"
        cells = (predicted, measured, format_ratio(item.ratio), verdict)
        rows.append((code(item.name), *((escape(item.column),) if many else ()), *cells))
    lines = table_lines(header, "l" + "l" * many + "rrrl", rows)
    for item in lab.predictions:
        if item.verdict in ("off", "differs"):
            where = f" ({escape(item.column)})" if many and item.column else ""
            lines.append(f"- {code(item.name)}{where}: {escape(item.suspect or 'no suspect was named')}")
    return [*lines, ""] if lines[-1] else lines


def _group(group: Group, many: bool) -> list[str]:
    header = (
        "way",
        *(("allocator",) if many else ()),
        "time [95 %]",
        "against the first",
        "first call",
        "of the limit",
    )
    rows = []
    for row in group.rows:
        speed = row.speedup
        against = (
            f"{format_interval('speedup', speed.value, speed.low, speed.high)} {escape(speed.verdict)}"
            if speed
            else NOTHING
        )
        cells = (
            format_interval("time_s", row.seconds, row.low, row.high),
            against,
            format_seconds(row.cold_s),
            format_value("roof_fraction", row.fraction_of_roof),
        )
        rows.append((code(row.name), *((escape(row.column),) if many else ()), *cells))
    table = table_lines(header, "l" + "l" * many + "rrrr", rows)
    return [
        f"<details><summary>Every way of {_html(group.name)} that was timed</summary>",
        "",
        *table,
        "</details>",
        "",
    ]


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u200b")
