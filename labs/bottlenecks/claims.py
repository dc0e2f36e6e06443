"""What the lab teaches, each sentence decided by profiles and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labs.bottlenecks.ways import FAULT, FIXED, GROUPS, HEALTHY
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most

NONE = "none"
RIGHT = 0.9
FEWEST = 8
"""Undisturbed faults below which nothing is said of nine in ten."""
MENDED = 0.95
"""Of the faulty time: what a fix must reach, so that a tie is no gain."""


def diagnosis(results: Results, address: str) -> Mapping[str, Any] | None:
    """What the program said of the variant's profile; None where none was recorded."""
    found = results.info(address, "diagnosis") if results.has(address) else None
    return found if isinstance(found, Mapping) else None


def undisturbed(results: Results, address: str) -> bool:
    """Whether the machine had a core for each thread that wanted to run when the profile was recorded."""
    facts = (diagnosis(results, address) or {}).get("facts", {})
    load, cores = facts.get("load"), facts.get("cores")
    return not (load and cores and load > 1.5 * cores)


def judged(results: Results, name: str) -> dict[str, str]:
    """By group, what was said of its job of this name, where the machine was free: a right answer that was
    found beside other programs proves as little as a wrong one."""
    found = {}
    for group in GROUPS:
        address = f"{group}/{name}"
        said = diagnosis(results, address)
        if said is not None and undisturbed(results, address):
            found[group] = str(said["bottleneck"])
    return found


def named_right(results: Results) -> bool | None:
    """Nine in ten of the faults; undecidable where too few of them had the machine."""
    said = judged(results, FAULT)
    if len(said) < FEWEST:
        return None
    return sum(cause == group for group, cause in said.items()) >= RIGHT * len(said)


def fixed_is_not_named(results: Results) -> bool | None:
    """Of no mended job the cause that was mended."""
    said = judged(results, FIXED)
    if any(cause == group for group, cause in said.items()):
        return False
    return True if len(said) >= FEWEST else None


def healthy_is_healthy(results: Results) -> bool | None:
    found = diagnosis(results, HEALTHY)
    if found is None or not undisturbed(results, HEALTHY):
        return None
    return bool(found["bottleneck"] == NONE)


def mended(group: str, bound: float = MENDED) -> Callable[[Results], bool | None]:
    def holds(results: Results) -> bool | None:
        fault, fixed = f"{group}/{FAULT}", f"{group}/{FIXED}"
        if not results.has(fault, fixed):
            return None
        if not (undisturbed(results, fault) and undisturbed(results, fixed)):
            return None
        return at_most(results.ratio(fixed, fault), bound)

    return holds


def gain(results: Results, group: str) -> Interval | None:
    """How many times faster the fix is, measured."""
    fault, fixed = f"{group}/{FAULT}", f"{group}/{FIXED}"
    if not results.has(fault, fixed):
        return None
    ratio = results.ratio(fixed, fault)
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def foretold(results: Results, group: str) -> float | None:
    """The gain that the evidence for the planted cause promises, from the faulty profile alone; None of a
    cause that costs no time."""
    found = diagnosis(results, f"{group}/{FAULT}")
    for evidence in (found or {}).get("evidence", ()):
        if evidence["cause"] == group:
            said = evidence.get("gain")
            return float(said) if said is not None else None
    return None


def gains_are_foretold(results: Results) -> bool | None:
    """Of every cause that costs time, within a factor of two."""
    verdicts = []
    for group in GROUPS:
        said, measured = foretold(results, group), gain(results, group)
        if said is not None and measured is not None and undisturbed(results, f"{group}/{FAULT}"):
            verdicts.append(all_of(at_least(measured, said / 2), at_most(measured, said * 2)))
    if any(verdict is False for verdict in verdicts):
        return False
    return all_of(*verdicts) if len(verdicts) >= FEWEST else None


def holds_less(results: Results) -> bool | None:
    """By the bytes that a step took at its peak; what was left of the limit differs by profile."""
    taken = []
    for name in (FAULT, FIXED):
        found = diagnosis(results, f"memory_capacity/{name}")
        size = (found or {}).get("facts", {}).get("memory_B")
        if size is None:
            return None
        taken.append(size)
    return taken[1] < 0.9 * taken[0]


REASONS = {
    "input": "Reading overlaps with computing, and reads with one another. If it fails: the reader "
    "needs the core.",
    "python": "A tensor operation loops in compiled code. If it fails: there is little to compute.",
    "dispatch": "A call costs the same for few numbers as for many. If it fails: the pieces are large.",
    "allocator": "Kept memory is not faulted in again. If it fails: blocks are below malloc's threshold.",
    "memory_bandwidth": "One pass instead of many. If it fails: all tensors fit the cache.",
    "compute_precision": "16-bit products have a higher peak. If it fails: conversions cost what "
    "products save.",
    "communication": "Fewer messages, and backward runs meanwhile. If it fails: messages cost next "
    "to nothing.",
    "straggler": "A step ends with its latest rank. If it fails: a busy core makes every rank late.",
    "transfer_synchronization": "Launches run ahead of the device. If it fails: there is little to launch.",
    "oversubscription": "Threads that take turns wait for those that are off. If it fails: regions are long.",
}

CLAIMS = (
    Claim(
        "From the profile alone the program names the planted fault, in at least nine of ten.",
        named_right,
        "Each cause leaves its mark on other facts: gaps, small operators, page faults, types, "
        "threads, ranks.",
    ),
    Claim(
        "Of the healthy job it says: none.",
        healthy_is_healthy,
        "Nothing but products of matrices and fused operations takes a fifth of its time. If it "
        "fails: look at "
        "the diagnosis's evidence; the job may have a bottleneck on this machine.",
    ),
    Claim(
        "Of no mended job it says the cause that was mended.",
        fixed_is_not_named,
        "The mark goes with the cause. If it fails: what is named was not the fault's doing.",
    ),
    *(
        Claim(f"Mending {group.replace('_', ' ')} makes the step faster.", mended(group), why)
        for group, why in REASONS.items()
    ),
    Claim(
        "Computing activations again needs less of the memory than keeping them.",
        holds_less,
        "Only each block's input is kept (Chen et al. 2016). If it fails: other memory dominates.",
    ),
    Claim(
        "The gain that the diagnosis foretells from the faulty profile is the measured one within a "
        "factor of two, for every cause that costs time.",
        gains_are_foretold,
        "What a cause takes of the time is what goes (Amdahl 1967). If it fails: the fix leaves a part, or "
        "brings a cost of its own; the picture shows which cause it is.",
    ),
)
