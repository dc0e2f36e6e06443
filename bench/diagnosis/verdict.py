"""One name for a job: the cause that costs most, how sure that is, and what comes second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.diagnosis.causes import FULL, LEAST, NONE, ROOM, RULES, Evidence
from bench.diagnosis.facts import Facts, facts_of
from bench.traces.events import Job

CLEAR = 2.0
"""A cause that costs so many times what the next costs, or what counts at all, is clear."""


@dataclass(frozen=True)
class Diagnosis:
    """bottleneck: a cause or "none". sure: "clear", "likely" or "close". ranked: the evidence of every rule
    that applies, the costliest first."""

    bottleneck: str
    sure: str
    ranked: Sequence[Evidence]
    facts: Facts

    @property
    def evidence(self) -> Evidence | None:
        return next((one for one in self.ranked if one.cause == self.bottleneck), None)

    @property
    def second(self) -> Evidence | None:
        """The next in line; of a healthy job the nearest to a bottleneck."""
        return next((one for one in self.ranked if one.cause != self.bottleneck), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "bottleneck": self.bottleneck,
            "sure": self.sure,
            "gain": self.evidence.gain if self.evidence else 1.0,
            "evidence": [asdict(one) | {"weight": weight(one), "gain": one.gain} for one in self.ranked],
            "lacks": list(self.facts.lacks),
            "facts": self.facts.to_json(),
        }


def weight(evidence: Evidence) -> float:
    """What evidence counts against ``LEAST``. A full memory costs no time that could be compared: it counts
    from ``FULL`` on, as the share above it of what is above."""
    if evidence.of == ROOM:
        return max(0.0, LEAST + (evidence.share - FULL) / (1 - FULL) * (1 - LEAST) / 2)
    return evidence.share


def diagnose(job: Job) -> Diagnosis:
    """Of one job, of all its ranks. ValueError: its reports have no timeline."""
    return decide(facts_of(job))


def decide(facts: Facts) -> Diagnosis:
    """The diagnosis of a job with these facts."""
    ranked = sorted(filter(None, (rule(facts) for rule in RULES)), key=lambda one: -weight(one))
    first = weight(ranked[0]) if ranked else 0.0
    second = weight(ranked[1]) if len(ranked) > 1 else 0.0
    if first < LEAST:
        return Diagnosis(NONE, "clear" if first * CLEAR < LEAST else "likely", ranked, facts)
    beyond = first / max(second, LEAST / CLEAR)
    sure = "clear" if beyond >= CLEAR else "likely" if beyond >= CLEAR**0.5 else "close"
    return Diagnosis(ranked[0].cause, sure, ranked, facts)
