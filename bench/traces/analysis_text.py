"""What a trace says, in words: a sentence and notes; and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec.structs import asdict

from bench.report.units import text_of
from bench.traces.analysis import Analysis, Unit
from bench.traces.events import Kind, Trace
from bench.traces.operations import Kernel, Operation
from bench.traces.tables import amount, percent, seconds

LONGEST_NAME = 60
_WORTH_SAYING = 0.1  # a part below this share is not in the sentence


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name for a table or a sentence: C++ kernels have names of a page, which the JSON has whole."""
    return text_of(name.removeprefix("void "), longest)


def where(analysis: Analysis) -> str:
    """Whose time it is: ``the host``, ``device 0 (NVIDIA H100)``, ``8 devices (TPU v4)``."""
    if not analysis.on_device:
        return "the host"
    model = analysis.trace.facts.get("device", "")
    count = len(analysis.units)
    what = analysis.units[0].activity.name if count == 1 else f"{count} devices"
    return f"{what} ({short(model)})" if model else what


def sentence(analysis: Analysis) -> str:
    """What dominates, and why nothing ran when nothing did."""
    trace = analysis.trace
    if not len(trace.events):
        return "nothing was recorded"
    if analysis.whole is None:
        top = _first_operation(analysis)
        text = f"{amount(analysis.sums.self_time, trace.unit)} in {analysis.operation_count} operations"
        return f"{text}, {top}" if top else text
    whole = analysis.whole
    clauses = {
        "compute": _compute_clause(analysis),
        "exposed": _exposed_clause(analysis),
        "copies": f"copies beside which nothing else ran {percent(whole.copies, whole.span)}",
        "idle": _idle_clause(analysis),
    }
    order = sorted(clauses, key=lambda part: -getattr(whole, part))
    said = [clauses[part] for part in order if whole.share(part) >= _WORTH_SAYING] or [clauses[order[0]]]
    step = f" of {short(analysis.step)}" if analysis.step else ""
    return f"{where(analysis)}, {seconds(whole.span)}{step}: {'; '.join(said)}"


def _compute_clause(analysis: Analysis) -> str:
    assert analysis.whole is not None
    text = f"compute {percent(analysis.whole.compute, analysis.whole.span)}"
    if analysis.on_device:
        named = [kernel for kernel in analysis.kernels if kernel.kind is Kind.KERNEL]
        total = sum(kernel.time for kernel in named)
        top = f"most in {short(named[0].name)}: {percent(named[0].time, total)} of it" if named else ""
    else:
        top = _first_operation(analysis)
    return f"{text} ({top})" if top else text


def _first_operation(analysis: Analysis) -> str:
    by_kind = analysis.sums.by_kind
    computing = Kind.OPERATOR if Kind.OPERATOR in by_kind else Kind.FUNCTION
    first = next((one for one in analysis.operations if one.kind is computing), None)
    if first is None or not first.self_time:
        return ""
    return f"most in {short(first.name)}: {percent(first.self_time, by_kind[computing])} of it"


def _exposed_clause(analysis: Analysis) -> str:
    assert analysis.whole is not None
    text = f"exposed communication {percent(analysis.whole.exposed, analysis.whole.span)}"
    names = exposed_names(analysis.units)
    return f"{text} ({short(names.most_common(1)[0][0])})" if names else text


def exposed_names(units: Sequence[Unit]) -> Counter[str]:
    """Nanoseconds of exposed communication by collective, over all units."""
    names: Counter[str] = Counter()
    for unit in units:
        names.update(unit.exposed)
    return names


def _idle_clause(analysis: Analysis) -> str:
    assert analysis.whole is not None
    text = "idle" if analysis.on_device else "outside operators"
    text += f" {percent(analysis.whole.idle, analysis.whole.span)}"
    causes: Counter[str] = Counter()
    for unit in analysis.units:
        for reason in unit.idle:
            causes[reason.text()] += reason.time
    if not causes:
        return text
    cause, time = causes.most_common(1)[0]
    return f"{text} (most for one cause: {short(cause, 90)}, {seconds(time)})"


def notes(analysis: Analysis) -> list[str]:
    """How the trace was cut, and all that is in no table: counted."""
    trace = analysis.trace
    found = [analysis.steps.sentence()] if analysis.whole is not None else []
    if not trace.timed:
        found.append("the report has sums but no times: what ran when, and what was idle, cannot be said")
    if analysis.unlinked and analysis.on_device:
        found.append(f"slices on devices whose launch is not in the report: {analysis.unlinked}")
    return found + left_out(trace) + trace.notes


def left_out(trace: Trace) -> list[str]:
    """What a reader dropped or could not classify, counted."""
    found = []
    if trace.dropped:
        found.append("left out: " + _counted(trace.dropped))
    if trace.unclassified:
        found.append("of unknown kind, in no sum: " + _counted(trace.unclassified))
    return found


def _counted(counts: Counter[str], most: int = 6) -> str:
    first = counts.most_common(most)
    shown = ", ".join(f"{count} {short(what)}" for what, count in first)
    rest = len(counts) - len(first)
    number = counts.total() - sum(count for _, count in first)
    return f"{shown}, and {number} of {rest} other kinds" if rest else shown


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Plain data: times in nanoseconds (or in the ``unit`` that stands in it), memory in bytes, rates a
    second, names whole."""
    trace = analysis.trace
    steps = zip(analysis.steps.names, analysis.steps.complete.tolist(), analysis.by_step, strict=False)
    return {
        "source": trace.source,
        "format": trace.format,
        "rank": trace.rank,
        "sentence": sentence(analysis),
        "facts": trace.facts,
        "events": len(trace.events),
        "step": analysis.step or None,
        "time": asdict(analysis.whole) if analysis.whole else None,
        "unit": trace.unit or "ns",
        "units": [_unit_json(unit) for unit in analysis.units],
        "steps": [{"name": name, "complete": complete, **asdict(parts)} for name, complete, parts in steps],
        "trimmed_steps": dict(analysis.steps.trimmed),
        "kernels": [_with_kind(one) for one in analysis.kernels],
        "operations": [_with_kind(one) for one in analysis.operations],
        "operation_count": analysis.operation_count,
        "roof": asdict(analysis.roof) if analysis.roof else None,
        "lanes": [
            {
                **asdict(trace.lanes[time.lane]),
                "slices": time.slices,
                "busy": time.busy,
                "by_kind": {kind.name.lower(): length for kind, length in time.by_kind.items()},
            }
            for time in analysis.lanes
        ],
        "memory": [asdict(use) for use in analysis.memory],
        "unlinked": analysis.unlinked,
        "dropped": dict(trace.dropped),
        "unclassified": dict(trace.unclassified),
        "notes": notes(analysis),
    }


def _with_kind(one: Operation | Kernel) -> dict[str, Any]:
    return {**asdict(one), "kind": one.kind.name.lower()}


def _unit_json(unit: Unit) -> dict[str, Any]:
    return {
        "name": unit.activity.name,
        "device": unit.activity.device,
        "process": unit.activity.process or None,
        "time": asdict(unit.whole),
        "idle": [asdict(reason) for reason in unit.idle],
        "waits_for_streams": [asdict(reason) for reason in unit.waits],
        "exposed_communication": unit.exposed,
    }
