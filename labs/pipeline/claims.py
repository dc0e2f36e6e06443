"""What the lab teaches, each sentence decided by what was measured or counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from labs.lab import Claim, Results, all_of, at_most, values_of
from labs.pipeline import derived
from labs.pipeline.config import MODELS
from labs.pipeline.running import VIRTUAL

TIE = 0.05
"""Predicted times that differ by less are no order: stage times are not known better."""
REAL_TIE = 0.1
"""The same of real stages, which were measured alone: what gloo's threads take from cores that compute, and
twice as often where a rank has two stages, is not in them."""


def in_order(results: Results, group: str, said: Mapping[str, float], tie: float) -> bool | None:
    """Whether no schedule that was said to be faster than another is measured slower; ties within the
    interval are allowed, and where there is nothing else it is undecidable. said: seconds by name; tie: by
    which share they must differ."""
    verdicts = [
        at_most(results.ratio(f"{group}/{faster}", f"{group}/{slower}"), 1.0)
        for faster in said
        for slower in said
        if said[faster] < (1 - tie) * said[slower]
    ]
    decided = [verdict for verdict in verdicts if verdict is not None]
    return all(decided) if decided else None


def virtual_order(results: Results) -> bool | None:
    """By what was predicted before anything was measured."""
    said = {}
    for name in results.config.names(results.config.ranks):
        seconds = results.predicted(f"{VIRTUAL}/{name}")
        if results.has(f"{VIRTUAL}/{name}") and seconds is not None:
            said[name] = seconds
    return in_order(results, VIRTUAL, said, TIE)


def real_order(model: str) -> Callable[[Results], bool | None]:
    """By the simulator with stage times that were measured alone."""

    def holds(results: Results) -> bool | None:
        said = {}
        for name in results.config.names(results.config.stages):
            seconds = (
                derived.from_stage_times(results, model, name) if results.has(f"{model}/{name}") else None
            )
            if seconds is not None:
                said[name] = seconds
        cores = results.machine.cores
        return in_order(results, model, said, REAL_TIE) if cores >= results.config.stages else None

    return holds


def faster(new: str, base: str) -> Callable[[Results], bool | None]:
    """On virtual devices, where that is predicted for this size."""

    def holds(results: Results) -> bool | None:
        mine, other = f"{VIRTUAL}/{new}", f"{VIRTUAL}/{base}"
        if not results.has(mine, other):
            return None
        said, bound = results.predicted(mine), results.predicted(other)
        if said is None or bound is None or said >= bound:
            return None
        return at_most(results.ratio(mine, other), 1.0)

    return holds


def activations_are_predicted(results: Results) -> bool | None:
    """Of every schedule on every rank, exactly."""
    from parallel.schedules import peak_activations

    verdicts: list[bool | None] = []
    config = results.config
    for group, ranks in (*((model, config.stages) for model in MODELS), (VIRTUAL, config.ranks)):
        for address in results.variants(group):
            said = peak_activations(config.schedule_of(address.partition("/")[2], ranks)).tolist()
            found = [values_of(results, address, f"rank{rank}_in_flight") for rank in range(ranks)]
            verdicts.append([one[-1] for one in found] == said if all(found) else None)
    return all_of(*verdicts) if verdicts else None


def held(results: Results, name: str) -> float | None:
    """The most that a virtual rank held, in activations of a rank's whole share."""
    config, address = results.config, f"{VIRTUAL}/{name}"
    counts = values_of(results, address, "in_flight")
    if not counts:
        return None
    schedule = config.schedule_of(name, config.ranks)
    return counts[-1] * schedule.world_size / schedule.stages


def holds_less(name: str, other: str) -> Callable[[Results], bool | None]:
    """Counted; undecidable where there are too few micro-batches to tell them apart."""

    def holds(results: Results) -> bool | None:
        mine, others = held(results, name), held(results, other)
        if mine is None or others is None or results.config.microbatches <= results.config.ranks:
            return None
        return mine < others

    return holds


CLAIMS = (
    Claim(
        "On virtual devices the predicted order of schedules by step time is the measured order.",
        virtual_order,
        "Work is a set time, so that only the order of actions decides. If it fails: a busy machine wakes "
        "ranks late, and schedules with more actions suffer more.",
    ),
    *(
        Claim(
            f"On real stages of the {model.replace('_', '-')} the order of schedules by step time, simulated "
            "from stage times measured alone, is the measured order.",
            real_order(model),
            "Where a cleverer schedule loses, its stages tell so beforehand: two half backwards take longer "
            "than a whole one, and more actions and messages cost more. Undecidable with fewer cores than "
            "ranks.",
        )
        for model in MODELS
    ),
    Claim(
        "Two stages a rank shrink the bubble: interleaved 1F1B is faster than 1F1B on virtual devices.",
        faster("interleaved_1f1b", "1f1b"),
        "The pipeline fills with half stages.",
    ),
    Claim(
        "Weight gradients fill the bubble: ZB-V is faster than interleaved 1F1B on virtual devices.",
        faster("zb_v", "interleaved_1f1b"),
        "Nobody waits for a weight gradient, so it can be computed where the rank would idle.",
    ),
    Claim(
        "The activations that each rank holds at most are predicted exactly, for every schedule.",
        activations_are_predicted,
        "They follow from the order of actions alone.",
    ),
    Claim(
        "1F1B holds fewer activations than GPipe, for the same bubble.",
        holds_less("1f1b", "gpipe"),
        "It goes backward as soon as a gradient can be there: p micro-batches are in flight, not m.",
    ),
    Claim(
        "V-Half holds fewer activations than 1F1B.",
        holds_less("v_half", "1f1b"),
        "It crosses the V so quickly that p+2 half stages are in flight where 1F1B's first rank has p whole.",
    ),
)
