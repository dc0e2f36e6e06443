"""What the lab teaches, each sentence decided by what was measured or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of
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
        if usual is None or not other.low or other.value < SEEN * usual.value:
            return None  # too few prompts: none has stalled a writer
        budget = values_of(results, derived.live_address(policy), "budget_tokens")
        if policy == "chunked" and (not budget or budget[-1] > results.config.prompt / 2):
            return None  # the limits are so loose that the best chunk is a whole prompt
        return at_most(Interval(mine.value / other.value, mine.low / other.high, mine.high / other.low), 1.0)

    return holds


def books_balance(results: Results) -> bool | None:
    """Little's law, in every block of every policy."""
    verdicts = []
    for policy in POLICIES:
        row = values_of(results, derived.live_address(policy), "little_off_fraction")
        verdicts.append(at_most(Interval.exact(row[-1]), 0.05) if row else None)
    return all_of(*verdicts)


def map_ratios(results: Results) -> dict[extrapolation.Case, list[float]]:
    """Goodput disaggregated over colocated, of each case: as measured, and then under every change. Without
    the cases in which colocated workers attain the limits at no rate: there is nothing to divide by."""
    found = {}
    for case in extrapolation.map_cases(results.config):
        apart, together = (
            values_of(results, MAP, f"{case.key}_{kind}_requests_per_s")
            for kind in (extrapolation.DISAGGREGATED, extrapolation.COLOCATED)
        )
        if together and all(together):
            found[case] = [mine / other for mine, other in zip(apart, together, strict=True)]
    return found


def spread(ratios: Sequence[float]) -> Interval:
    """The first, as measured, with the range under every change."""
    return Interval(ratios[0], min(ratios), max(ratios))


def loses_where_writing_dominates(results: Results) -> bool | None:
    """In every case of the map with at least as many tokens written as read, under every change."""
    rows = [spread(row) for case, row in map_ratios(results).items() if case.output >= case.prompt]
    return all_of(*(at_most(ratio, 1.0) for ratio in rows)) if rows else None


def long_prompts_favour_it(results: Results) -> bool | None:
    """With the longest outputs and the same limits it stands better with the longest prompts than with any
    others, under every change."""
    rows = map_ratios(results)
    verdicts = []
    for case, long in rows.items():
        if (case.prompt, case.output) == (
            max(each.prompt for each in rows),
            max(each.output for each in rows),
        ):
            for other, short in rows.items():
                if (
                    (other.output, other.limits) == (case.output, case.limits)
                    and other != case
                    and all(short)
                ):
                    better = spread([mine / theirs for mine, theirs in zip(long, short, strict=True)])
                    verdicts.append(at_least(better, 1.0))
    return all_of(*verdicts) if verdicts else None


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
        "The books balance: requests in the house, as workers count them, are rate times stay (Little).",
        books_balance,
        "If it fails, a request was lost or served twice, or reports of steps were.",
    ),
    Claim(
        "With one worker to read and one to write, disaggregation is to be avoided where outputs are as "
        "long as prompts: colocated workers have the larger goodput (simulated).",
        loses_where_writing_dominates,
        "The worker that reads idles, and half of the memory and cores write. More workers in another ratio "
        "help: see the sweep over workers of a normal run.",
    ),
    Claim(
        "With long outputs, the longer the prompts the better disaggregation stands (simulated).",
        long_prompts_favour_it,
        "Colocated writers wait for as long as a prompt takes, and what a token may take does not grow with "
        "it. Who writes a few tokens hardly ever waits.",
    ),
)
