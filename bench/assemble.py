"""From a run's journal to its results: benchmarks, predictions, proofs, verdicts, figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from bench.measure import explain
from bench.results import FORMAT, LabResults, claim_rows, compared_predictions, foretold, group_rows, summary
from labs import load
from labs.figure import to_json
from labs.lab import Lab
from labs.machine import Machine

Event = Mapping[str, Any]


def assemble(events: Iterable[Event]) -> dict[str, Any]:
    """The results dictionary of all events of a run, finished or not."""
    events = list(events)
    header = next(event for event in events if event["event"] == "plan")
    session = next((event for event in reversed(events) if event["event"] == "session"), {})
    end = next((event for event in reversed(events) if event["event"] == "end"), {})
    benchmarks = list({_address(e): e["benchmark"] for e in events if e["event"] == "variant"}.values())
    machine = Machine.from_json(header["machine"])
    labs = {
        name: _lab_section(
            load(name), settings, machine, benchmarks, [e for e in events if e.get("lab") == name], header
        )
        for name, settings in header["labs"].items()
    }
    return {
        "machine_info": session.get("machine_info", {}),
        "commit_info": session.get("commit_info", {}),
        "benchmarks": benchmarks,
        "datetime": header["started"],
        "version": session.get("version", ""),
        "perflab": {
            "format": FORMAT,
            "command": header["command"],
            "started": header["started"],
            "finished": end.get("finished", ""),
            "seconds": end.get("seconds"),
            "scale": header["scale"],
            "device": header["device"] or ("cpu and cuda" if machine.gpu else "cpu"),
            "machine": header["machine"],
            "notes": header["notes"],
            "labs": labs,
        },
    }


def _address(event: Event) -> tuple[str, str, str]:
    return event["lab"], event["variant"], event["column"]


def _lab_section(
    lab: Lab,
    settings: Mapping[str, Any],
    machine: Machine,
    benchmarks: Sequence[Mapping[str, Any]],
    events: Sequence[Event],
    header: Event,
) -> dict[str, Any]:
    config = lab.config(**settings)
    views: dict[str, LabResults] = {}
    for column in lab.columns:
        views[column] = LabResults(lab, config, machine.with_allocator(column), benchmarks, column)
    predictions = {e["column"]: e["predictions"] for e in events if e["event"] == "predictions"}
    errors = _last_by(events, "error", lambda e: (e["variant"], e["column"]))
    ended = _last_by(events, "group", lambda e: (e["group"], e["column"]))
    lost = [e for e in events if e["event"] == "lost"]
    # A group measured again after --resume replaces what went wrong in it before.
    wrong = [e for e in errors if not any(g["complete"] and _same_group(g, e) for g in ended)]
    wrong += [e for e in lost if not any(g["complete"] and _same_group(g, e) for g in ended)]
    expected = sum(len({v.group for v in lab.variants(config)}) for _ in lab.columns)
    status = "failed" if wrong else "done" if len(ended) >= expected else "partial"
    rows = compared_predictions(predictions, views)
    section: dict[str, Any] = {
        "question": lab.question,
        "answer": lab.answer,
        "sources": list(lab.sources),
        "settings": [
            {
                "name": f.name,
                "value": settings[f.name],
                "unit": f.metadata["unit"],
                "help": f.metadata["help"],
            }
            for f in fields(lab.config)
        ],
        "status": status,
        "error": "; ".join(f"{e.get('variant') or e['group']}: {e['error']}" for e in wrong),
        "seconds": sum(e.get("seconds", 0.0) for e in ended),
        "command": header["commands"][lab.name],
        "predictions": rows,
        "summary": summary(foretold(rows)),
        "elsewhere": next((e["predictions"] for e in events if e["event"] == "elsewhere"), []),
        "groups": group_rows(lab, views),
        "checks": [
            {"column": e["column"], **e["check"]}
            for e in _last_by(events, "check", lambda e: (e["check"]["variant"], e["column"]))
        ],
        "unavailable": [
            {"variant": e["variant"], "reason": e["reason"]}
            for e in _last_by(events, "unavailable", lambda e: e["variant"])
        ],
    }
    view = views[lab.columns[0]]
    section["listings"] = [
        {"variant": address, "title": title, "text": text}
        for address in view.variants()
        for title, text in view.info(address, "texts", {}).items()
    ]
    section["claims"] = claim_rows(lab, view) if view.variants() else []
    section["figures"] = []
    if view.variants():
        try:
            section["figures"] = [to_json(figure) for figure in lab.figure(view)]
        except LookupError as error:
            section["figure_error"] = f"no figure: {error.args[0]}"
        except Exception as error:
            section["figure_error"] = f"no figure: {explain(error)}"
            section["status"] = "failed"
            section["error"] = section["error"] or section["figure_error"]
    return section


def _same_group(group: Event, event: Event) -> bool:
    return group["group"] == event["group"] and group["column"] == event["column"]


def _last_by(events: Sequence[Event], kind: str, key: Any) -> list[Event]:
    """The last event of a kind for each key, in order of first appearance."""
    found: dict[Any, Event] = {}
    for event in events:
        if event["event"] == kind:
            found[key(event)] = event
    return list(found.values())


def failures(results: Mapping[str, Any]) -> list[str]:
    """Why a run ends with exit status 1: labs that failed, proofs and claims that do not hold."""
    lines = []
    for name, lab in results["perflab"]["labs"].items():
        if lab["status"] == "failed":
            lines.append(f"{name} failed: {lab['error']}")
        for check in lab["checks"]:
            if not check["passed"]:
                lines.append(
                    f"{name}: {check['variant']} ({check['column']}) differs from {check['against']}: "
                    f"error {check['error']:.3g}, allowed {check['tolerance']:.3g}"
                )
        for prediction in lab["predictions"]:
            if prediction["verdict"] == "differs":
                lines.append(
                    f"{name}: {prediction['variant']} {prediction['key']} is {prediction['measured']}, "
                    f"exactly {prediction['predicted']} was predicted"
                )
        lines += [
            f"{name}: claim fails: {claim['text']}" for claim in lab["claims"] if claim["verdict"] == "fails"
        ]
    return lines
