"""What the lab teaches, each sentence decided by the measured intervals or by what was counted."""

from __future__ import annotations

from collections.abc import Callable

from labs.jax_transforms import (
    batched,
    derivatives,
    dispatch,
    misuse,
    recurrent,
    retracing,
    sample_gradients,
    sharding,
    softmax,
    training,
)
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of

Verdict = Callable[[Results], bool | None]


def slower(slow: str, fast: str, bound: float) -> Verdict:
    """Whether ``slow`` takes at least ``bound`` times as long as ``fast``."""

    def holds(results: Results) -> bool | None:
        if not results.has(slow, fast):
            return None
        return at_least(results.ratio(slow, fast), bound)

    return holds


def within(new: str, base: str, low: float, high: float) -> Verdict:
    """Whether the ratio of two times lies between two bounds."""

    def holds(results: Results) -> bool | None:
        if not results.has(new, base):
            return None
        ratio = results.ratio(new, base)
        return all_of(at_least(ratio, low), at_most(ratio, high))

    return holds


def counted(results: Results, address: str, name: str) -> float | None:
    """The last recorded value, or None where there is none."""
    found = values_of(results, address, name)
    return found[-1] if found else None


def recorded_ratio(new: str, base: str, name: str, bound: float, least: bool = False) -> Verdict:
    """Whether what ``new`` counted is at most (at least) ``bound`` times what ``base`` did."""

    def holds(results: Results) -> bool | None:
        mine, other = counted(results, new, name), counted(results, base, name)
        if mine is None or other is None:
            return None
        return mine >= bound * other if least else mine <= bound * other

    return holds


def compiles_slower(slow: str, fast: str, bound: float) -> Verdict:
    """Whether compiling takes at least ``bound`` times as long, by the intervals of several compilations."""

    def holds(results: Results) -> bool | None:
        both = [values_of(results, address, "compile_s") for address in (slow, fast)]
        if not all(both):
            return None
        long, short = map(Interval.of_few, both)
        return at_least(long.over(short), bound)

    return holds


def a_loop_is_counted_once(results: Results) -> bool | None:
    """Whether XLA's count for ``scan``, times the steps, is that of the unrolled loop, to a per cent."""
    once, all_steps = (
        counted(results, f"{recurrent.GROUP}/{name}", "xla_FLOP") for name in ("scan", "unrolled")
    )
    if once is None or all_steps is None:
        return None
    return abs(once * results.config.steps / all_steps - 1) <= 0.01


def donating_saves(results: Results) -> bool | None:
    """Whether temporaries and output, less what is reused, come to at most 0.9 of the plain step's."""
    sums = []
    for way in ("donated", "step"):
        address = f"{training.GROUP}/{way}"
        parts = [counted(results, address, f"{part}_B") for part in ("temporary", "output", "reused")]
        if None in parts:
            return None
        temporary, output, reused = (part or 0.0 for part in parts)
        sums.append(temporary + output - reused)
    return sums[0] <= 0.9 * sums[1]


def counts(address: str, expected: Callable[[Results], dict[str, float]]) -> Verdict:
    """Whether each recorded value is the expected one."""

    def holds(results: Results) -> bool | None:
        found = {name: counted(results, address, name) for name in expected(results)}
        if any(value is None for value in found.values()):
            return None
        return found == expected(results)

    return holds


def every(*verdicts: Verdict) -> Verdict:
    return lambda results: all_of(*(verdict(results) for verdict in verdicts))


def _collectives(results: Results) -> dict[str, float]:
    found = {f"{layout}_collectives": float(len(kinds)) for layout, kinds in sharding.EXPECTED.items()}
    payload = {
        f"{layout}_payload_B": sharding.RESULT_BYTES * len(kinds)
        for layout, kinds in sharding.EXPECTED.items()
    }
    return found | payload


CLAIMS = (
    Claim(
        "A jitted 8 x 8 product that is waited for takes at least 1.5 times as long as a 7 x 7 product.",
        slower(f"{dispatch.GROUP}/handed_over_8x8", f"{dispatch.GROUP}/inline_7x7", 1.5),
        "XLA's CPU client runs programs below 1000 FLOPs on the caller's thread and hands others to its own. "
        "If it fails, that limit has changed.",
    ),
    Claim(
        "vmap of a small product is at least 10 times as fast as a loop of calls.",
        slower(f"{batched.GROUP}/loop", f"{batched.GROUP}/vmap", 10.0),
        "A call costs microseconds and a product of 8 x 8 some tens of nanoseconds; vmap makes one batched "
        "product of all of them.",
    ),
    Claim(
        "vmap of grad gives every sample's gradient at least 1.5 times as fast as a loop over samples.",
        slower(f"{sample_gradients.GROUP}/loop", f"{sample_gradients.GROUP}/vmap", 1.5),
        "One call instead of one a sample. Where gradients are large, writing them takes the same time "
        "either way, and the two come closer.",
    ),
    Claim(
        "The loss with its gradient takes 2 to 4 times as long as the loss (3 by FLOPs).",
        within(f"{training.GROUP}/{training.GRADIENT}", f"{training.GROUP}/{training.FORWARD}", 2.0, 4.0),
        "Each product of the forward pass has two in backward, but the first layer needs no gradient of its "
        "input. Below: what a call costs in any case.",
    ),
    Claim(
        "A jitted step is at least 1.5 times as fast as the same function run eagerly.",
        slower(f"{training.GROUP}/eager", f"{training.GROUP}/step", 1.5),
        "Eagerly, each operation is a program of its own, and the gradient is traced anew at every call. "
        "The larger the products, the less that weighs.",
    ),
    Claim(
        "Donated parameters are updated in place: exactly their bytes are reused.",
        counts(
            f"{training.GROUP}/donated",
            lambda results: {
                "reused_B": float(4 * training.networks.number_of_parameters(training.sizes(results.config)))
            },
        ),
        "The compiled program's input_output_alias ties each new parameter to the old one's buffer.",
    ),
    Claim(
        "That saves less than it reuses: temporaries grow, but with the output that is not reused they stay "
        "below 0.9 of what the plain step needs.",
        donating_saves,
        "A parameter that is still to be read may not be overwritten yet, so that its gradient waits in a "
        "temporary of its own.",
    ),
    Claim(
        "jax.checkpoint around the layers of an MLP changes no product on a CPU: FLOPs stay within 5 %.",
        recorded_ratio(f"{training.GROUP}/checkpoint", f"{training.GROUP}/step", "xla_FLOP", 1.05),
        "The recomputation stands behind an optimization_barrier, which XLA's CPU compiler drops before it "
        "finds that the same product is there already. See the excerpts.",
    ),
    Claim(
        "Inside a scan it works: checkpoint needs less than 0.7 of the temporary memory, and more FLOPs.",
        every(
            recorded_ratio(
                f"{recurrent.GRADIENT}/checkpoint", f"{recurrent.GRADIENT}/scan", "temporary_B", 0.7
            ),
            recorded_ratio(
                f"{recurrent.GRADIENT}/checkpoint", f"{recurrent.GRADIENT}/scan", "xla_FLOP", 1.1, True
            ),
        ),
        "Forward and backward are two while loops; nothing is shared between their turns, so that what is to "
        "be recomputed is recomputed.",
    ),
    Claim(
        "A loop that Python unrolls takes at least 3 times scan's time to compile, for at least 8 times the "
        "kernels.",
        every(
            compiles_slower(f"{recurrent.GROUP}/unrolled", f"{recurrent.GROUP}/scan", 3.0),
            recorded_ratio(f"{recurrent.GROUP}/unrolled", f"{recurrent.GROUP}/scan", "kernels", 8.0, True),
        ),
        "scan compiles one turn as a while loop; unrolled, every step has kernels of its own.",
    ),
    Claim(
        "XLA counts the FLOPs of a loop's body once: scan's count, times the steps, is the unrolled loop's.",
        a_loop_is_counted_once,
        "cost_analysis does not know how often a while loop turns. Whoever divides its FLOPs by a time gets "
        "a rate that is too low by the number of turns.",
    ),
    Claim(
        "A recurrent network that Python unrolled takes at least 0.6 of scan's time to run.",
        slower(f"{recurrent.GROUP}/unrolled", f"{recurrent.GROUP}/scan", 0.6),
        "The same products one after another; a turn of the loop costs little beside them.",
    ),
    Claim(
        "A loop of calls of one jitted step takes at least twice scan's time, and an eager loop four times.",
        every(
            slower(f"{recurrent.GROUP}/loop", f"{recurrent.GROUP}/scan", 2.0),
            slower(f"{recurrent.GROUP}/eager", f"{recurrent.GROUP}/scan", 4.0),
        ),
        "A call for each step, or several.",
    ),
    Claim(
        "With few inputs and many outputs forward mode is at least 1.5 times as fast as reverse mode.",
        slower(f"{derivatives.JACOBIAN}/reverse", f"{derivatives.JACOBIAN}/forward", 1.5),
        "One pass for each input, or one for each output: the passes are the columns of a product.",
    ),
    Claim(
        "One program for a Hessian is at least 3 times as fast as a loop of Hessian-vector products.",
        slower(f"{derivatives.HESSIAN}/loop", f"{derivatives.HESSIAN}/forward_over_reverse", 3.0),
        "vmap makes products of matrices of the products of vectors, and one call of many.",
    ),
    Claim(
        "A Pallas kernel in interpret mode is at least 1.5 times slower than the same lines under jit.",
        slower(f"{softmax.GROUP}/pallas_interpret", f"{softmax.GROUP}/jit", 1.5),
        "Its grid is a while loop that slices a block out and updates it in: for proofs, not for speed.",
    ),
    Claim(
        "Every new shape is traced once, and padding to one shape leaves one trace.",
        every(
            counts(
                f"{retracing.GROUP}/every_length", lambda results: {"traces": float(results.config.lengths)}
            ),
            counts(f"{retracing.GROUP}/padded", lambda results: {"traces": 1.0}),
        ),
        "A program is compiled for shapes and dtypes, not for values.",
    ),
    Claim(
        "Over host devices a layout decides the collectives: none for rows of x, one all-gather for columns "
        "of w, one all-reduce for its rows, each of the result's bytes; DTensor counts the same all-reduce.",
        every(
            counts(sharding.SHARD_MAP, _collectives),
            counts(sharding.DTENSOR, lambda results: {"rows_collectives": 1.0}),
        ),
        "What is cut along the sum leaves each device a part of every number.",
    ),
    Claim(
        "Side effects, prints, branches and shapes that depend on values, keys drawn from twice and donated "
        "arrays used again each get a message that says what to do instead.",
        counts(misuse.VARIANT, lambda results: {f"{name}_caught": 1.0 for name in misuse.CASES}),
        "JAX refuses some of them and passes over others; labs/jax_transforms/guards.py asks about all.",
    ),
)
