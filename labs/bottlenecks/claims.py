"""What the lab teaches, each sentence decided by profiles and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labs.bottlenecks.ways import FAULT, FIXED, GROUPS, HEALTHY
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most

NONE = "none"
RIGHT = 0.9
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


def planted(results: Results) -> dict[str, str]:
    """Faults that ran here: address -> the name that is right."""
    return {f"{group}/{FAULT}": group for group in GROUPS if diagnosis(results, f"{group}/{FAULT}")}


def named_right(results: Results) -> bool | None:
    """Nine in ten, or undecidable where other programs held the jobs up."""
    right, wrong = 0, 0
    for address, cause in planted(results).items():
        said = (diagnosis(results, address) or {}).get("bottleneck")
        if said == cause:
            right += 1
        elif undisturbed(results, address):
            wrong += 1
    if not right + wrong:
        return None
    return right >= RIGHT * (right + wrong)


def healthy_is_healthy(results: Results) -> bool | None:
    found = diagnosis(results, HEALTHY)
    if found is None:
        return None
    if found["bottleneck"] == NONE:
        return True
    return False if undisturbed(results, HEALTHY) else None


def mended(group: str, bound: float = MENDED) -> Callable[[Results], bool | None]:
    def holds(results: Results) -> bool | None:
        fault, fixed = f"{group}/{FAULT}", f"{group}/{FIXED}"
        if not results.has(fault, fixed):
            return None
        faster = at_most(results.ratio(fixed, fault), bound)
        return faster if faster or undisturbed(results, fixed) else None

    return holds


def gain(results: Results, group: str) -> Interval | None:
    """How many times faster the fix is, measured."""
    fault, fixed = f"{group}/{FAULT}", f"{group}/{FIXED}"
    if not results.has(fault, fixed):
        return None
    ratio = results.ratio(fixed, fault)
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def foretold(results: Results, group: str) -> float | None:
    """The gain that the evidence for the planted cause promises, from the faulty profile alone."""
    found = diagnosis(results, f"{group}/{FAULT}")
    for evidence in (found or {}).get("evidence", ()):
        if evidence["cause"] == group and group != "memory_capacity":
            return 1.0 / max(1.0 - min(evidence["share"], 0.99), 1e-2)
    return None


def gains_are_foretold(results: Results) -> bool | None:
    """Within a factor of two, of input and python: what a fix leaves of others is the machine's affair."""
    verdicts = []
    for group in ("input", "python"):
        said, measured = foretold(results, group), gain(results, group)
        if said is not None and measured is not None:
            near = all_of(at_least(measured, said / 2), at_most(measured, said * 2))
            verdicts.append(near if near or undisturbed(results, f"{group}/{FAULT}") else None)
    return all_of(*verdicts) if verdicts else None


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
        "factor of "
        "two, for input and python.",
        gains_are_foretold,
        "What the loop waits is what goes. If it fails: the profiler's own cost changes the shares.",
    ),
)
