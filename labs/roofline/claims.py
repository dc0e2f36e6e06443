"""What the lab teaches, each sentence decided by the measured intervals."""

from __future__ import annotations

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most
from labs.machine import MMAP_THRESHOLD_BYTES
from labs.roofline.operations import Operation, operations


def _rate(results: Results, address: str, amount: float) -> Interval:
    seconds = results.seconds(address)
    return Interval(amount / seconds.value, amount / seconds.high, amount / seconds.low)


def _operation(results: Results, group: str) -> Operation:
    return next(operation for operation in operations(results.config) if operation.group == group)


def _flops_per_second(results: Results, group: str) -> Interval:
    return _rate(results, f"{group}/cpu", _operation(results, group).flops)


def _quotient(left: Interval, right: Interval) -> Interval:
    return Interval(left.value / right.value, left.low / right.high, left.high / right.low)


def _tuned(results: Results) -> Results:
    return results.in_column("tuned")


def product_computes_more(results: Results) -> bool | None:
    tuned = _tuned(results)
    if not tuned.has("matmul_large/cpu", "add_memory/cpu"):
        return None
    return at_least(
        _quotient(_flops_per_second(tuned, "matmul_large"), _flops_per_second(tuned, "add_memory")), 10
    )


def cache_is_faster(results: Results) -> bool | None:
    tuned, cache = _tuned(results), results.machine.get("l3_bytes")
    large = _operation(results, "add_memory").bytes_moved
    if not tuned.has("add_cache/cpu", "add_memory/cpu") or cache is None or large < 2 * cache:
        return None
    in_cache = _rate(tuned, "add_cache/cpu", _operation(results, "add_cache").bytes_moved)
    return at_least(_quotient(in_cache, _rate(tuned, "add_memory/cpu", large)), 1.3)


def small_work_is_overhead(results: Results) -> bool | None:
    if not results.has("add_one/cpu", "add_cache/cpu"):
        return None
    one, many = results.seconds("add_one/cpu"), results.seconds("add_cache/cpu")
    return at_most(_quotient(many, one), results.config.cache_elements / 100)


def bfloat16_follows_the_units(results: Results) -> bool | None:
    machine, (wide, narrow) = results.machine, ("matmul_large/cpu", "matmul_large/cpu_bfloat16")
    if not results.has(wide, narrow):
        return None
    units = machine.get("matrix_bfloat16_all_flops")
    ratio = results.ratio(narrow, wide)
    if units is None:
        return at_least(ratio, 0.75)
    return at_most(ratio, 0.75) if units >= 1.8 * machine["vector_float32_all_flops"] else None


def fresh_memory_costs_more_than_the_work(results: Results) -> bool | None:
    default, tuned = results.in_column("default"), _tuned(results)
    if not all(column.has("relu_memory/cpu", "add_memory/cpu") for column in (default, tuned)):
        return None
    if _operation(results, "relu_memory").writes < MMAP_THRESHOLD_BYTES:
        return None
    return all_of(
        *(
            at_least(_quotient(default.seconds(f"{group}/cpu"), tuned.seconds(f"{group}/cpu")), 1.3)
            for group in ("relu_memory", "add_memory")
        )
    )


CLAIMS = (
    Claim(
        "A large matrix product does at least 10 times the FLOP/s of an addition of large vectors.",
        product_computes_more,
        "An addition does one operation for 12 bytes and waits for memory; a product of n x n uses each "
        "number n times. If this fails, look at the BLAS library, or at cores slow for their memory.",
    ),
    Claim(
        "An addition in cache moves at least 1.3 times the bytes a second of one from memory.",
        cache_is_faster,
        "Caches are nearer and one per core. Undecidable where the large vectors are not twice the size of "
        "the last-level cache: raise memory_elements. Page faults are kept out (tuned allocator).",
    ),
    Claim(
        "Adding a few hundred thousand numbers takes less than a hundredth of as many additions of one.",
        small_work_is_overhead,
        "A call of about a microsecond costs as much as thousands of additions: small work is dispatch.",
    ),
    Claim(
        "A bfloat16 product beats a float32 one by a quarter or more just where the CPU has bfloat16 units.",
        bfloat16_follows_the_units,
        "Half the bytes do not help a product, which is limited by arithmetic: the units decide (AMX, "
        "AVX-512 BF16). Undecidable where the measured units are less than 1.8 times the float32 ones.",
    ),
    Claim(
        "With outputs of 32 MiB, glibc's default allocator makes relu and addition 1.3 times slower or more.",
        fresh_memory_costs_more_than_the_work,
        "malloc maps such a block anew at every call, and the kernel faults in and zeroes each of its pages. "
        "Fails where another allocator is preloaded or transparent huge pages are always on.",
    ),
)
