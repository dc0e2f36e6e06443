"""What the lab teaches, each sentence decided by counts or by measured intervals."""

from __future__ import annotations

from collections.abc import Callable

from labs.collectives import derived
from labs.collectives.config import SMALL_KIB
from labs.collectives.ways import OPERATIONS, SWEEP, SWEEP_WAYS, more_group, ways_of
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of

Holds = Callable[[Results], bool | None]


def _sent(results: Results, address: str) -> float | None:
    counted = values_of(results, address, "sent_B")
    return counted[-1] if counted else None


def _with_cores(holds: Holds) -> Holds:
    """A *no* counts only where the ranks had their cores: where the products, which need nothing else, took
    less than 1.5 times what the cores' peak allows."""

    def decided(results: Results) -> bool | None:
        verdict, meter = holds(results), "overlap_matmul/compute"
        if verdict is not False:
            return verdict
        predicted = results.predicted(meter) if results.has(meter) else None
        free = predicted is not None and results.seconds(meter).value < 1.5 * predicted
        return False if free else None

    return decided


def bytes_are_predicted(results: Results) -> bool | None:
    """Every collective of ours; None when one was not counted."""
    addresses = [f"{name}/{way}" for name in OPERATIONS for way in ways_of(name) if way.startswith("ours")]
    verdicts: list[bool | None] = []
    for address in addresses:
        counted, predicted = _sent(results, address), results.predicted(address, "sent_B")
        verdicts.append(None if counted is None or predicted is None else counted == predicted)
    return all_of(*verdicts)


def _fewer_bytes(one: str, every: str, bound: float) -> Holds:
    """What ``one`` sends is at most ``bound`` of what ``every`` does."""

    def holds(results: Results) -> bool | None:
        left, right = _sent(results, one), _sent(results, every)
        return None if left is None or right is None else left <= bound * right

    return holds


def _no_slower(one: str, every: str, bound: float) -> Holds:
    def holds(results: Results) -> bool | None:
        verdicts = []
        for way in ("gloo", "ours"):
            names = f"{one}/{way}", f"{every}/{way}"
            if not results.has(*names):
                return None
            verdicts.append(at_most(_quotient(*(results.seconds(name) for name in names)), bound))
        return all_of(*verdicts)

    return holds


def small_is_latency(results: Results) -> bool | None:
    small = SMALL_KIB[0]
    gloo, shm = f"{SWEEP}/gloo_{small}", f"{SWEEP}/shm_{small}"
    return at_least(results.ratio(gloo, shm), 5.0) if results.has(gloo, shm) else None


def _fit_holds(way: str) -> Holds:
    def holds(results: Results) -> bool | None:
        ratio = derived.large_ratio(results, way)
        return None if ratio is None else all_of(at_least(ratio, 0.5), at_most(ratio, 2.0))

    return holds


def _quotient(left: Interval, right: Interval) -> Interval:
    """Of two that were not measured in the same rounds."""
    return Interval(left.value / right.value, left.low / right.high, left.high / right.low)


def more_ranks_cost_more(results: Results) -> bool | None:
    config = results.config
    group = more_group(config.more_ranks)
    pairs = [(f"{group}/{way}", f"all_reduce/{way}") for way in SWEEP_WAYS]
    if not config.more_ranks > config.ranks or not results.has(*(name for pair in pairs for name in pair)):
        return None
    ratios = [_quotient(results.seconds(more), results.seconds(fewer)) for more, fewer in pairs]
    return all_of(*(at_least(ratio, 1.0) for ratio in ratios))


def _hides(kind: str) -> Holds:
    def holds(results: Results) -> bool | None:
        share = derived.hidden(results, kind)
        return None if share is None else at_least(share, 0.7)

    return holds


CLAIMS = (
    Claim(
        "Where one rank needs the data, gather sends at most half of all-gather's bytes.",
        _fewer_bytes("gather/ours", "all_gather/ours", 0.5),
        "To one rank go (p-1)/p n bytes, to every rank p times as many. Counted in the backend, not timed.",
    ),
    Claim(
        "Where one rank has the data, scatter sends at most half of all-to-all's bytes.",
        _fewer_bytes("scatter/ours", "all_to_all/ours", 0.5),
        "One rank gives away (p-1)/p n bytes; in an all-to-all each does. A tree sends some twice from 4 "
        "ranks on, still fewer.",
    ),
    Claim(
        "Gather takes at most 1.1 times as long as all-gather.",
        _with_cores(_no_slower("gather", "all_gather", 1.1)),
        "The busiest link carries the same bytes in both; the others' stay free in a gather. Over gloo and "
        "ours.",
    ),
    Claim(
        "Scatter takes at most 1.1 times as long as all-to-all.",
        _with_cores(_no_slower("scatter", "all_to_all", 1.1)),
        "The busiest link carries the same bytes in both; the others' stay free in a scatter. Over gloo and "
        "ours.",
    ),
    Claim(
        "Who needs only a part of the sum stops half way: reduce-scatter sends half of all-reduce's bytes.",
        _fewer_bytes("reduce_scatter/ours", "all_reduce/ours_ring", 0.5),
        "All-reduce is a reduce-scatter and an all-gather. FSDP uses the two halves apart.",
    ),
    Claim(
        "Every collective of ours sends exactly the bytes of its formula.",
        bytes_are_predicted,
        "Counted in the backend (parallel/link.py), summed over all ranks.",
    ),
    Claim(
        f"Shared memory is at least 5 times as fast as gloo for an all-reduce of {SMALL_KIB[0]} KiB.",
        _with_cores(small_is_latency),
        "A small message costs latency: gloo's passes sockets and wakes threads, shared memory's a flag that "
        "the other rank watches. Undecided, like all times here, where other programs had the cores.",
    ),
    *(
        Claim(
            f"Alpha and beta of {way}'s small all-reduces predict the large one within 2x.",
            _with_cores(_fit_holds(way)),
            f"A line fitted on {SMALL_KIB[0]} to {SMALL_KIB[-1]} KiB. Off where the large one leaves the "
            "cache or changes the algorithm.",
        )
        for way in SWEEP_WAYS
    ),
    Claim(
        "More ranks take longer for the same all-reduce.",
        _with_cores(more_ranks_cost_more),
        "2 (p-1) messages and 2 (p-1)/p n bytes, on cores that the ranks share. Undecidable where only one "
        "world was measured (more_ranks=0).",
    ),
    Claim(
        "Asynchronous layers hide at least 0.7 of the shorter of compute and communication.",
        _with_cores(_hides("virtual")),
        "Virtual compute: the rank sleeps as beside an accelerator. Only the last layer hides nothing.",
    ),
    Claim(
        "So they do when a core computes, over a link that needs none.",
        _with_cores(_hides("matmul")),
        "Real products. Where sending takes the core that computes there is less to hide.",
    ),
)
