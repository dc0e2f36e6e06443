"""From a run's journal to its results: benchmarks, predictions, proofs, verdicts, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from bench.measure import explain
from bench.results import FORMAT, LabResults, claim_rows, compared_predictions, foretold, group_rows, summary
from labs import calibration_anchors as anchors
from labs import load
from labs.figure import to_json
from labs.lab import Lab, Measurement, NotMeasured
from labs.machine import Machine

Event = Mapping[str, Any]
Answer = TypeVar("Answer")


def assemble(events: Iterable[Event]) -> dict[str, Any]:
    """The results dictionary of all events of a run, finished or not."""
    events = list(events)
    header = next(event for event in events if event["event"] == "plan")
    session = next((event for event in reversed(events) if event["event"] == "session"), {})
    end = next((event for event in reversed(events) if event["event"] == "end"), {})
    benchmarks = list({_address(e): e["benchmark"] for e in events if e["event"] == "variant"}.values())
    machine = Machine.from_json(header["machine"])
    labs = {}
    for name, settings in header["labs"].items():
        mine = [event for event in events if event.get("lab") == name]
        try:
            labs[name] = _lab_section(load(name), settings, machine, benchmarks, mine, header)
        except Exception as error:  # of one lab: the others keep what was measured
            labs[name] = _without_section(name, header, explain(error))
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
            "notes": [*header["notes"], *_speed_notes(events)],
            "labs": labs,
        },
    }


def _speed_notes(events: Sequence[Event]) -> list[str]:
    """In one sentence, at which speeds labs found the machine, and what could not be checked; each lab's own
    are in its results."""
    checks = _last_by(events, "speed", lambda event: (event["lab"], event["column"]))
    notes = [
        f"{each['lab']} ({each['column']}) predicts with the constants as they are: its speed could not be "
        f"checked: {each['error']}"
        for each in checks
        if "error" in each
    ]
    said = anchors.said(event["speeds"] for event in checks)
    if said:
        notes.append(f"measured again before each lab, which predicts with what it found: {said}")
    return notes


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
    lost = _last_by(events, "lost", lambda e: (e["group"], e["column"]))
    # A group measured again after --resume replaces what went wrong in it before.
    wrong = [e for e in errors if not any(g["complete"] and _same_group(g, e) for g in ended)]
    wrong += [e for e in lost if not any(g["complete"] and _same_group(g, e) for g in ended)]
    view = views[lab.columns[0]]
    faults: dict[str, str] = {}
    groups: list[str] = _asked("variants", lambda: [v.group for v in lab.variants(config)], [], faults)
    derived: list[Measurement] = _asked("derive", lambda: list(lab.derive(view)), [], faults)
    without: dict[str, str] = {}  # why there is no figure, which is no fault where a variant could not run
    figures: list[Any] = []
    if view.variants():
        figures = _asked("figure", lambda: [to_json(one) for one in lab.figure(view)], [], faults, without)
    said = [f"{e.get('variant') or e['group']}: {e['error']}" for e in wrong]
    said += [f"{part}: {error}" for part, error in faults.items()]
    complete = len(ended) >= len(set(groups)) * len(lab.columns)
    status = "failed" if said else "done" if complete else "partial"
    rows = compared_predictions(predictions, views, derived)
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
        "error": "; ".join(said),
        "seconds": sum(e.get("seconds", 0.0) for e in ended),
        "speeds": {e["column"]: e["speeds"] for e in events if e["event"] == "speed"},
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
    section["listings"] = [
        {"variant": address, "title": title, "text": text}
        for address in view.variants()
        for title, text in view.info(address, "texts", {}).items()
    ]
    section["claims"] = claim_rows(lab, view) if view.variants() else []
    section["figures"] = figures
    section["figure_error"] = without.get("figure", "")
    return section


def _asked(
    part: str,
    ask: Callable[[], Answer],
    otherwise: Answer,
    faults: dict[str, str],
    without: dict[str, str] | None = None,
) -> Answer:
    """What a function of the lab's says. Where it raises, ``otherwise``, and why: in ``without`` when it
    asked for what was not measured here, else in ``faults``."""
    try:
        return ask()
    except NotMeasured as error:
        if without is not None:
            without[part] = str(error)
    except Exception as error:
        faults[part] = explain(error)
    return otherwise


def _without_section(name: str, header: Event, error: str) -> dict[str, Any]:
    """The section of a lab of which nothing can be said; its samples are among the benchmarks."""
    empty: dict[str, Any] = {part: [] for part in ("predictions", "groups", "checks", "claims", "figures")}
    command = header["commands"][name]
    return {"question": name, "status": "failed", "error": error, "command": command, "settings": []} | empty


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
        if lab["status"] != "done":
            lines.append(f"{name} {lab['status']}: {lab['error'] or 'not every group was measured'}")
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
