"""What the lab teaches, each sentence decided by what was counted or measured."""

from __future__ import annotations

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of
from labs.tuning import curves, stragglers
from labs.tuning.model import EXACT
from labs.tuning.ways import FIDELITIES, FIDELITY, PEER, SEARCH, START, TOGETHER

LOADED = 2.0
"""What is measured once is known within this factor: by so much a loaded and a quiet run of one machine
differed, over all that was measured in both."""
NEAR = 5
"""Times the target: how far from random search's best a search that gives trials up may end."""
UNKNOWN = 0.3
"""A rank correlation with the end below this: losses say nothing of it."""


def _measured(results: Results) -> bool:
    return results.has(f"{SEARCH}/random") and bool(curves.ends(results, f"{SEARCH}/random"))


def steps_are_predicted(results: Results) -> bool | None:
    verdicts = []
    for name in EXACT:
        address = f"{SEARCH}/{name}"
        counted = values_of(results, address, "steps")
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
    share = curves.share_to_target(results, address)
    return share is not None and at_most(share, 1 / 4)


def giving_up_is_safe(results: Results) -> bool | None:
    address = f"{SEARCH}/extrapolating"
    if not _measured(results) or not results.has(address):
        return None
    regret, share = curves.regret(results, address), curves.share_of_random(results, address)
    if regret is None or share is None:
        return False
    return all_of(regret <= NEAR * results.config.target_nats, at_most(share, 1 / 2))


def later_rungs_rank_better(results: Results) -> bool | None:
    """The last rung before the end against the first."""
    rungs = results.config.rungs()
    if not _measured(results) or len(rungs) < 3:
        return None
    end = curves.at(results, results.config.most_steps)
    return _above(curves.closer(curves.at(results, rungs[-2]), curves.at(results, rungs[0]), end))


def drawing_on_ranks_better(results: Results) -> bool | None:
    """At the first rung; undecidable where a loss ranks well there already."""
    if not _measured(results) or curves.with_the_end(results, results.config.least_steps) > 2 * UNKNOWN:
        return None
    plain, drawn = (
        curves.at(results, results.config.least_steps, extrapolate) for extrapolate in (False, True)
    )
    return _above(curves.closer(drawn, plain, curves.at(results, results.config.most_steps)))


def _above(difference: Interval) -> bool | None:
    """Above nothing; an end of the interval on it decides nothing."""
    return None if difference.low <= 0 <= difference.high else difference.low > 0


def early_losses_mislead(results: Results) -> bool | None:
    """Undecidable where the first rung's losses know something of the end, or the winner is among the best
    there: then halving is no worse for them."""
    config = results.config
    names = [f"{SEARCH}/{name}" for name in ("successive_halving", "asha")]
    if not _measured(results) or not results.has(*names):
        return None
    first, end = curves.at(results, config.least_steps), curves.at(results, config.most_steps)
    winner = min(range(len(end)), key=end.__getitem__)
    ahead = sorted(range(len(first)), key=first.__getitem__)[: len(first) // config.eta]
    if not curves.rank_correlation(first, end) < UNKNOWN or winner in ahead:
        return None
    return all(curves.time_to_target(results, name) is None for name in names)


def cheaper_steps_cost_more_than_half(results: Results) -> bool | None:
    """Undecidable where arithmetic is most of a step, so that this is not predicted."""
    addresses = [f"{FIDELITY}/{name}" for name in FIDELITIES]
    whole = f"{SEARCH}/random"
    if not _measured(results) or not results.has(*addresses):
        return None
    said = [results.predicted(address) for address in (whole, *addresses)]
    if any(each is None for each in said) or min(said[1:]) < said[0] / 2:  # type: ignore[type-var, operator]
        return None
    shares = [curves.share_of_random(results, address) for address in addresses]
    return all_of(*(None if share is None else at_least(share, 1 / 2) for share in shares))


def asynchronous_is_busier(results: Results) -> bool | None:
    if not _measured(results) or not results.config.late_probability or results.config.simulated_workers < 3:
        return None
    return at_least(stragglers.busier(results, "asha", "successive_halving"), 1.0)


def warm_is_faster(results: Results) -> bool | None:
    """Undecidable where that is not predicted at these sizes."""
    warm, default = f"{START}/warm_workers", f"{START}/ray_tune"
    if not _predicted(results, warm, default, 1 / 3):
        return None
    ratio = results.seconds(warm).value / results.seconds(default).value
    return at_most(Interval(ratio, ratio / LOADED, ratio * LOADED), 1 / 3)


def own_search_is_faster(results: Results) -> bool | None:
    """Undecidable where that is not predicted at these sizes."""
    own, peers = f"{SEARCH}/asha", f"{SEARCH}/{PEER}"
    if not _predicted(results, own, peers, 1 / 2):
        return None
    ratio = results.seconds(own).value / results.seconds(peers).value
    return at_most(Interval(ratio, ratio / LOADED, ratio * LOADED), 1.0)


def together_is_faster(results: Results) -> bool | None:
    """Than in turn, whatever computes; undecidable where that is not predicted at these sizes."""
    new, rivals = f"{TOGETHER}/jax_vmap", [f"{TOGETHER}/{name}" for name in ("torch_in_turn", "jax_in_turn")]
    if not all(_predicted(results, new, each, 1.0) for each in rivals):
        return None
    return all_of(*(at_most(results.ratio(new, each), 1.0) for each in rivals))


def _predicted(results: Results, new: str, base: str, bound: float) -> bool:
    """Whether both were measured, and new / base is said to be at most ``bound``."""
    if not results.has(new, base):
        return False
    said, other = results.predicted(new), results.predicted(base)
    return said is not None and other is not None and said / other <= bound


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
        "Where losses at the first rung say nothing of the end (a rank correlation below "
        f"{UNKNOWN}) and hide the winner, neither synchronous nor asynchronous halving by loss comes within "
        "the target of full random search's best.",
        early_losses_mislead,
        "Who is not sent on is not found again. If it fails: another trial ends as well as the winner, or it "
        "was among the first to come to the rung, which pass unseen.",
    ),
    Claim(
        "Shorter sequences, smaller batches and a narrower model each cost at least half as much as the "
        "whole: of small steps only fewer are much cheaper.",
        cheaper_steps_cost_more_than_half,
        "Most of a small step is its calls, whose number stays. Undecidable where arithmetic is most of it.",
    ),
    Claim(
        "With jobs that are late asynchronous halving keeps workers busier than synchronous halving.",
        asynchronous_is_busier,
        "A rung that has to be full waits for its last trial. On a simulated clock, from recorded curves. "
        "Busier is not sooner: it sends more trials on.",
    ),
    Claim(
        "Warm workers train the same trials in at most a third of the time of Ray Tune's default, a process "
        "a trial.",
        warm_is_faster,
        "A process imports Ray and torch before it trains. Ray Tune runs once: known within a factor of "
        f"{LOADED:g}. Undecidable where trainings are so long that this is not predicted.",
    ),
    Claim(
        "Asynchronous halving on warm workers ends before that of Ray Tune over the same points and rungs, "
        "whose processes are used again.",
        own_search_is_faster,
        "Ray Tune starts its processes for each search, and a report to it goes through more hands. Both run "
        f"once: known within a factor of {LOADED:g}. Undecidable where trainings are so long that this is "
        "not predicted.",
    ),
    Claim(
        "Trials of one shape in one vmapped step of JAX take less time than one after another, in JAX or in "
        "torch.",
        together_is_faster,
        "Small models spend their time between operations, and one step has as few for K trials as for one. "
        "XLA has all cores, torch in turn one. Undecidable where models are so large that this is not "
        "predicted.",
    ),
)
