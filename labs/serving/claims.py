"""What the lab teaches, each sentence decided by what was measured or simulated."""

from __future__ import annotations

from collections.abc import Callable

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most
from labs.serving import derived, extrapolation
from labs.serving.layout import POLICIES
from labs.serving.ways import SIMULATED

SEEN = 3.0  # times the median gap: the longest one is a stall
MAP = f"{SIMULATED}/winner_map"


def shorter_stall(policy: str) -> Callable[[Results], bool | None]:
    """The longest gap, against prompts first; a range over blocks each."""

    def holds(results: Results) -> bool | None:
        mine = derived.of_blocks(results, policy, "itl_max_s")
        other = derived.of_blocks(results, "prefill_first", "itl_max_s")
        if mine is None or other is None or results.machine.cores < results.config.workers:
            return None
        usual = derived.of_blocks(results, "prefill_first", "itl_p50_s")
        if usual is None or other.value < SEEN * usual.value:
            return None  # too few prompts: none has stalled a writer
        budget = results.recorded(derived.live_address(policy), "budget_tokens")
        if policy == "chunked" and (not budget or budget[-1] > results.config.prompt / 2):
            return None  # the limits are so loose that the best chunk is a whole prompt
        return at_most(Interval(mine.value / other.value, mine.low / other.high, mine.high / other.low), 1.0)

    return holds


def books_balance(results: Results) -> bool | None:
    """Little's law, in every block of every policy."""
    verdicts = []
    for policy in POLICIES:
        address = derived.live_address(policy)
        row = results.recorded(address, "little_off_fraction") if results.has(address) else []
        verdicts.append(at_most(Interval.exact(row[-1]), 0.05) if row else None)
    return all_of(*verdicts)


def map_rows(results: Results) -> dict[extrapolation.Case, Interval]:
    """Goodput disaggregated over colocated, of each case: as measured, with its range under every change."""
    found = {}
    for case in extrapolation.map_cases(results.config):
        row = results.recorded(MAP, f"{case.key}_ratio") if results.has(MAP) else []
        if row:
            found[case] = Interval(row[0], min(row), max(row))
    return found


def loses_where_writing_dominates(results: Results) -> bool | None:
    """In every case of the map with many more tokens written than read, under every change."""
    rows = [ratio for case, ratio in map_rows(results).items() if case.output >= case.prompt]
    return all_of(*(at_most(ratio, 1.0) for ratio in rows)) if rows else None


def reading_favours_it(results: Results) -> bool | None:
    """The case with the longest prompts for its outputs stands better than the one with the longest
    outputs."""
    rows = sorted(map_rows(results).items(), key=lambda row: row[0].prompt / row[0].output)
    if len(rows) < 2:
        return None
    (_, few), (_, many) = rows[0], rows[-1]
    if not few.value or not many.value:
        return None
    return at_least(
        Interval(many.value / few.value, many.low / max(few.high, 1e-9), many.high / max(few.low, 1e-9)), 1.0
    )


CLAIMS = (
    Claim(
        "Chunked prefill stalls writers less than whole prompts: the longest gap is shorter.",
        shorter_stall("chunked"),
        "A decode waits for a chunk, not for the longest prompt. Undecidable at rates at which few decodes "
        "meet "
        "a prompt, when the best chunk is more than half of a prompt, or where workers share cores.",
    ),
    Claim(
        "Disaggregation stalls writers less than whole prompts: the longest gap is shorter.",
        shorter_stall("disaggregated"),
        "A decode never waits for a prompt; its first gap, in which keys and values travel, is short beside "
        "one. "
        "Undecidable at rates at which few decodes meet a prompt, or where workers share cores.",
    ),
    Claim(
        "The books balance: requests in the house are rate times stay (Little's law).",
        books_balance,
        "If it fails, a request was lost or counted twice, or processes have different clocks.",
    ),
    Claim(
        "With one worker to read and one to write, disaggregation is to be avoided where outputs are as "
        "long as prompts: colocated workers have the larger goodput (simulated).",
        loses_where_writing_dominates,
        "The worker that reads idles, and half of the memory and cores write. More workers in another ratio "
        "help: see the sweep over workers of a normal run.",
    ),
    Claim(
        "Long prompts with short outputs are where disaggregation stands best (simulated).",
        reading_favours_it,
        "They are what stalls writers, and the load on both kinds of workers is more alike.",
    ),
)
