"""What the lab teaches, each sentence decided by what was counted or measured."""

from __future__ import annotations

from collections.abc import Callable

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most
from labs.tuning import curves, stragglers
from labs.tuning.model import EXACT
from labs.tuning.ways import SEARCH, START, TOGETHER

SINGLE_RUN = 0.1  # what is measured once is known within so much, at best
NEAR = 5
"""Times the target: how far from random search's best a search that gives trials up may end."""


def _once(value: float) -> Interval:
    return Interval(value, value * (1 - SINGLE_RUN), value * (1 + SINGLE_RUN))


def _measured(results: Results) -> bool:
    return results.has(f"{SEARCH}/random") and bool(curves.ends(results, f"{SEARCH}/random"))


def steps_are_predicted(results: Results) -> bool | None:
    verdicts = []
    for name in EXACT:
        address = f"{SEARCH}/{name}"
        counted = results.recorded(address, "steps") if results.has(address) else ()
        if not counted:
            return None
        verdicts.append(counted[-1] == results.predicted(address, "steps"))
    return all(verdicts)


def kept(results: Results) -> bool | None:
    """Whether the trial that ends best is among those whose extrapolated curves send them on from the first
    rung."""
    config = results.config
    whole = curves.whole_curves(results)
    rank = curves.by_extrapolation(config.most_steps)
    said = [rank({at: loss for at, loss in curve.items() if at <= config.least_steps}) for curve in whole]
    ends = [curve[config.most_steps] for curve in whole]
    winner = min(range(len(ends)), key=ends.__getitem__)
    count = max(1, len(ends) // config.eta**2)
    return winner in sorted(range(len(said)), key=said.__getitem__)[:count]


def extrapolation_arrives(results: Results) -> bool | None:
    """Within the target of random search's best, after a quarter of its time; undecidable where the first
    rung hides the winner."""
    address = f"{SEARCH}/asha_extrapolated"
    if not _measured(results) or not results.has(address) or not kept(results):
        return None
    reached = curves.time_to_target(results, address)
    return reached is not None and at_most(_once(reached / results.seconds(f"{SEARCH}/random").value), 1 / 4)


def giving_up_is_safe(results: Results) -> bool | None:
    address = f"{SEARCH}/extrapolating"
    if not _measured(results) or not results.has(address):
        return None
    regret, share = curves.regret(results, address), curves.share_of_random(results, address)
    if regret is None or share is None:
        return False
    return all_of(regret <= NEAR * results.config.target_nats, at_most(_once(share), 1 / 2))


def later_rungs_rank_better(results: Results) -> bool | None:
    """The last rung before the end against the first."""
    rungs = results.config.rungs()
    if not _measured(results) or len(rungs) < 3:
        return None
    return curves.with_the_end(results, rungs[-2]) > curves.with_the_end(results, rungs[0])


def drawing_on_ranks_better(results: Results) -> bool | None:
    """At the first rung; undecidable where a loss ranks well there already."""
    if not _measured(results):
        return None
    least = results.config.least_steps
    plain, drawn = (curves.with_the_end(results, least, extrapolate) for extrapolate in (False, True))
    return None if plain > 0.6 else drawn > plain


def asynchronous_is_busier(results: Results) -> bool | None:
    if not _measured(results) or not results.config.late_probability or results.config.simulated_workers < 3:
        return None
    return at_least(stragglers.gain(results, "asha", "successive_halving"), 1.0)


def _ratio(new: str, base: str, bound: float) -> Callable[[Results], bool | None]:
    """new / base at most ``bound``; undecidable where that is not predicted at these sizes."""

    def holds(results: Results) -> bool | None:
        if not results.has(new, base):
            return None
        said, other = results.predicted(new), results.predicted(base)
        if said is None or other is None or said / other > bound:
            return None
        ratio = results.seconds(new).value / results.seconds(base).value
        return at_most(_once(ratio) if new.startswith(START) else results.ratio(new, base), bound)

    return holds


warm_is_faster = _ratio(f"{START}/warm_workers", f"{START}/ray_tune", 1 / 3)
together_is_faster = _ratio(f"{TOGETHER}/jax_vmap", f"{TOGETHER}/torch_in_turn", 1.0)

CLAIMS = (
    Claim(
        "How many steps random search, successive halving, Hyperband and population based training take is "
        "predicted exactly.",
        steps_are_predicted,
        "They follow from the number of configurations, the rungs and eta; who goes on depends on losses.",
    ),
    Claim(
        "Later rungs rank trials better: the losses at the last rung before the end agree more with those at "
        "the end than those at the first rung do.",
        later_rungs_rank_better,
        "Early losses are those of whoever learns fast at first, which large rates do: a rung in that time "
        "sends on the wrong ones, and no scheduler can know.",
    ),
    Claim(
        "At the first rung curves that are drawn on to the end rank trials better than losses do.",
        drawing_on_ranks_better,
        "A curve says how fast it still falls. If it fails: curves that are not smooth, or too few losses.",
    ),
    Claim(
        "Where the winner is not hidden at the first rung, asynchronous halving by extrapolated curves comes "
        "within the target of full random search's best in at most a quarter of its time.",
        extrapolation_arrives,
        "All configurations get the first rung and 1/eta^2 of them the rest. Undecidable where the trial "
        "that ends best is not among those at the first rung: nobody who looks there can find it.",
    ),
    Claim(
        "To go on with the most promising curve, and give up those that do not lead to the best, ends within "
        f"{NEAR} times the target of full random search's best, in at most half of its time.",
        giving_up_is_safe,
        "Most trials are hopeless early. If it fails: the winner's curve was flat for a while and fell late.",
    ),
    Claim(
        "With jobs that are late asynchronous halving keeps workers busier than synchronous halving.",
        asynchronous_is_busier,
        "A rung that has to be full waits for its last trial. On a simulated clock, from recorded curves.",
    ),
    Claim(
        "Warm workers train the same trials in at most a third of the time of Ray Tune's default, a process "
        "a trial.",
        warm_is_faster,
        "A process imports Ray and torch before it trains. Undecidable where trainings are so long that this "
        "is not predicted.",
    ),
    Claim(
        "Trials of one shape in one vmapped step of JAX take less time than one after another in torch.",
        together_is_faster,
        "Small models spend their time between operations, and one step has as few for K trials as for one. "
        "Undecidable where models are so large that this is not predicted.",
    ),
)
