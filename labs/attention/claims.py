"""What the lab teaches, each sentence decided by the measured intervals."""

from __future__ import annotations

from labs.attention.config import Config
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of
from labs.machine import MMAP_THRESHOLD_BYTES


def _tuned(results: Results) -> Results:
    tuned = results.in_column("tuned")
    return tuned if tuned.variants() else results


def _ratio(results: Results, new: str, base: str, bound: float, least: bool) -> bool | None:
    if not results.has(new, base):
        return None
    return (at_least if least else at_most)(results.ratio(new, base), bound)


def fused_is_faster(results: Results) -> bool | None:
    """In both columns: the scores cost their trips even where malloc keeps its memory."""
    group = f"full_{results.config.length}"
    columns = (results.in_column("default"), _tuned(results))
    return all_of(*(_ratio(column, f"{group}/naive", f"{group}/fused", 1.2, True) for column in columns))


def fused_saves_memory(results: Results) -> bool | None:
    config: Config = results.config
    column = results.in_column("default")
    group = f"full_{config.length}"
    if not column.has(f"{group}/naive", f"{group}/fused"):
        return None
    naive, fused = (values_of(column, f"{group}/{name}", "extra_memory_B") for name in ("naive", "fused"))
    scores = 4.0 * config.heads * config.length**2
    if not naive or not fused or scores < MMAP_THRESHOLD_BYTES:
        return None
    return all_of(at_least(Interval.exact(naive[-1]), scores), at_most(Interval.exact(fused[-1]), scores / 4))


def causal_skips_half(results: Results) -> bool | None:
    column, length = _tuned(results), results.config.length
    causal, full = f"causal_{length}/fused", f"full_{length}/fused"
    if not column.has(causal, full):
        return None
    left, right = column.seconds(causal), column.seconds(full)
    return at_most(Interval(left.value / right.value, left.low / right.high, left.high / right.low), 0.75)


def window_is_linear(results: Results) -> bool | None:
    column, config = _tuned(results), results.config
    if config.window * 4 > config.length:
        return None
    group = f"window_{config.length}"
    return _ratio(column, f"{group}/torch", f"{group}/fused", 1.5, True)


def sharing_saves_the_copy(results: Results) -> bool | None:
    column, group = _tuned(results), f"gqa_{results.config.length}"
    return _ratio(column, f"{group}/fused", f"{group}/repeated", 1.02, False)


def cache_saves_everything(results: Results) -> bool | None:
    column, group = _tuned(results), f"token_{results.config.length}"
    return _ratio(column, f"{group}/recompute", f"{group}/cache", 20.0, True)


def pages_cost_little(results: Results) -> bool | None:
    column, group = _tuned(results), f"token_{results.config.length}"
    return _ratio(column, f"{group}/pages", f"{group}/cache", 1.5, False)


CLAIMS = (
    Claim(
        "Fused attention is at least 1.2 times as fast as the naive one at the longest length.",
        fused_is_faster,
        "The naive way writes and reads every score several times; the fused one keeps a tile in cache and "
        "rescales as the maximum moves. If it fails: are the scores small enough for the cache?",
    ),
    Claim(
        "The naive way needs the memory of all scores; the fused one less than a quarter of that.",
        fused_saves_memory,
        "Scores grow with the square of the length, tiles do not. Undecidable below 32 MiB of scores, where "
        "the allocator's own reserve hides them.",
    ),
    Claim(
        "Skipping masked tiles makes causal attention take at most three quarters of the full one's time.",
        causal_skips_half,
        "Half the pairs are masked; tiles on the diagonal are computed whole, and short rows have overhead.",
    ),
    Claim(
        "A kernel that skips outside the sliding window is 1.5 times as fast or more as one that masks.",
        window_is_linear,
        "A mask is applied after the work is done. Undecidable where the window is over a quarter of the "
        "length.",
    ),
    Claim(
        "Sharing keys and values between heads is never slower than repeating them first.",
        sharing_saves_the_copy,
        "The same arithmetic on a quarter of the keys; the repeated ones must be written and read.",
    ),
    Claim(
        "With a cache a token costs at most a twentieth of computing everything again.",
        cache_saves_everything,
        "Recomputing is quadratic in the length, reading the cache linear. Fails at very short lengths.",
    ),
    Claim(
        "Reading the cache page by page costs at most 1.5 times the contiguous one.",
        pages_cost_little,
        "A page of a head is a few KiB: long enough for the prefetcher. If it fails, look at the page size.",
    ),
)
