"""The pictures: loss against time, what rungs know, who worked when, what start-up and fidelities cost."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import NAN, Bars, Chart, Figure, Series, Span, Timeline, measured_and_predicted
from labs.lab import Interval, Results, values_of
from labs.tuning import curves, stragglers
from labs.tuning.config import METHODS
from labs.tuning.ways import FIDELITIES, FIDELITY, PEER, SEARCH, START, TOGETHER, TOGETHER_STEPS

TITLES = {
    "random": "random search",
    "successive_halving": "successive halving",
    "hyperband": "Hyperband",
    "asha": "ASHA",
    "asha_extrapolated": "ASHA, by extrapolated curves",
    "extrapolating": "most promising curve",
    "population": "population based training",
}
SHOWN = ("successive_halving", "asha", "extrapolating")
"""Searches whose workers are drawn."""


def figure(results: Results) -> Sequence[Figure]:
    found: list[Figure | None] = [_losses(results), _faster(results), _rungs(results), _selected(results)]
    found += [_workers(results, name) for name in SHOWN]
    found += [_methods(results), _late(results), _start(results), _together(results), _fidelity(results)]
    return [each for each in found if each is not None]


def _searched(results: Results) -> list[str]:
    return [name for name in METHODS if curves.ends(results, f"{SEARCH}/{name}")]


def _losses(results: Results) -> Figure | None:
    """The best whole training so far, against the time."""
    series = []
    for name in _searched(results):
        xs, ys = [], []
        least = float("inf")
        for at, loss in curves.ends(results, f"{SEARCH}/{name}"):
            if loss < least:
                least = loss
                xs.append(at)
                ys.append(loss)
        xs.append(results.seconds(f"{SEARCH}/{name}").value)
        ys.append(least)
        series.append(Series(TITLES[name], xs, ys, "line"))
    if not series:
        return None
    target = curves.best(results, f"{SEARCH}/random")
    note = (
        "each corner a whole training that was better than those before; the last point is the search's end"
    )
    if target is not None:
        edges = [min(each.x[0] for each in series), max(each.x[-1] for each in series)]
        near = target + results.config.target_nats
        series.append(Series("near enough", edges, [near, near], "dashed"))
    return Chart("Loss against time", "time (s)", "best loss (nats)", series, x_log=True, note=note)


def _faster(results: Results) -> Figure | None:
    """Each way to be faster by itself, against what it replaces."""
    measured: dict[str, float] = {}
    simulated: dict[str, float] = {}
    note = "each by itself; a search without a bar never came within the target"
    if "random" in _searched(results):
        for name in ("asha", "asha_extrapolated", "extrapolating"):
            share = curves.share_to_target(results, f"{SEARCH}/{name}")
            measured[f"{TITLES[name]}: to the target, against full random search"] = (
                1 / share.value if share else NAN
            )
        if results.config.late_probability and results.config.simulated_workers > 1:
            faster = stragglers.times_as_fast(results, "asha", "successive_halving")
            simulated["ASHA, against full rungs, with stragglers"] = faster.value
            note += (
                f"; ASHA's on a simulated clock, 95 % [{faster.low:.2f}, {faster.high:.2f}] over who is late"
            )
    for text, new, base in (
        ("warm workers, against Ray Tune's process a trial", f"{START}/warm_workers", f"{START}/ray_tune"),
        (
            "trials in one vmapped step, against torch on all workers",
            f"{TOGETHER}/jax_vmap",
            f"{TOGETHER}/torch_at_once",
        ),
    ):
        if results.has(new, base):
            measured[text] = results.seconds(base).value / results.seconds(new).value
    labels = [*measured, *simulated]
    if not labels:
        return None
    columns = {"measured": measured, "simulated": simulated}
    bars = {name: [column.get(label, NAN) for label in labels] for name, column in columns.items() if column}
    return Bars("How much faster", "times as fast (ratio)", labels, bars, note=note)


def _rungs(results: Results) -> Figure | None:
    """How losses on the way rank trials, as they are and drawn on."""
    if "random" not in _searched(results):
        return None
    config = results.config
    steps = [step for step in config.milestones() if step < config.most_steps]
    series = [
        Series(name, steps, [curves.with_the_end(results, step, drawn) for step in steps], "line")
        for name, drawn in (("by loss", False), ("by extrapolated curve", True))
    ]
    rungs = ", ".join(map(str, config.rungs()))
    return Chart(
        "What a rung knows of the end",
        "steps trained (steps)",
        "rank correlation with the end (ratio)",
        series,
        note=f"Spearman's, over {config.configurations} configurations; rungs at {rungs} steps",
    )


def _selected(results: Results) -> Figure | None:
    """The curves of the trial that ends best, of who leads at the first rung, and of the middle."""
    if "random" not in _searched(results):
        return None
    config = results.config
    whole = curves.whole_curves(results)
    first, most = config.least_steps, config.most_steps
    order = sorted(range(len(whole)), key=lambda trial: whole[trial][most])
    leader = min(range(len(whole)), key=lambda trial: whole[trial][first])
    chosen = {
        "ends best": order[0],
        "leads at the first rung": leader,
        "ends in the middle": order[len(order) // 2],
    }
    series = []
    for name, trial in chosen.items():
        points = [(step, loss) for step, loss in whole[trial].items() if loss < float("inf")]
        rate = config.points()[trial].learning_rate
        steps, losses = zip(*points, strict=True) if points else ((), ())
        series.append(Series(f"{name} (learning rate {rate:.2g})", steps, losses, "line"))
    return Chart("Three learning curves", "steps trained (steps)", "loss (nats)", series, x_log=True)


def _workers(results: Results, name: str) -> Figure | None:
    address = f"{SEARCH}/{name}"
    names = ("job_worker", "job_begin_s", "job_end_s", "job_stop")
    jobs = list(zip(*(values_of(results, address, column) for column in names), strict=True))
    if not jobs:
        return None
    rows = [
        (
            f"worker {worker}",
            [Span(begin, end, f"to {stop:.0f} steps") for at, begin, end, stop in jobs if at == worker],
        )
        for worker in range(results.config.workers)
    ]
    busy = results.recorded(address, "utilisation_ratio")[-1]
    note = f"{busy:.0%} of the workers' time with a job"
    if name == "extrapolating":
        count, of = results.recorded(address, "given_up")[-1], results.config.configurations
        note += f"; {count:.0f} of {of} trials were given up"
    return Timeline(f"{TITLES[name]}: who trained when", rows, note=note)


def _methods(results: Results) -> Figure | None:
    names = _searched(results)
    if "random" not in names:
        return None
    addresses = [f"{SEARCH}/{name}" for name in names]
    titles = [TITLES[name] for name in names]
    times = [curves.share_of_random(results, each) for each in addresses]
    regrets = [curves.regret(results, each) for each in addresses]
    busy = [results.recorded(each, "utilisation_ratio")[-1] for each in addresses]
    peers, whole = f"{SEARCH}/{PEER}", f"{SEARCH}/random"
    if results.has(peers):
        titles.append("Ray Tune's ASHA")
        times.append(Interval.exact(results.seconds(peers).value / results.seconds(whole).value))
        least = curves.best(results, whole)
        regrets.append(None if least is None else results.recorded(peers, "best_nats")[-1] - least)
        busy.append(NAN)

    def column(value: Interval | float | None) -> float:
        found = value.value if isinstance(value, Interval) else value
        return NAN if found is None else found

    note = "regret: its best loss less that of random search over the same configurations"
    if "population" in names:
        count = results.recorded(f"{SEARCH}/population", "taken_over")[-1]
        note += f"; in the population {count:.0f} times a member took over from a better one"
    return Bars(
        "What each search costs and finds",
        "ratio, or nats",
        titles,
        {
            "time, of random search's": [column(each) for each in times],
            "regret (nats)": [column(each) for each in regrets],
            "utilisation": busy,
        },
        note=note,
    )


def _late(results: Results) -> Figure | None:
    """Simulated, from recorded curves."""
    names = [
        name for name in ("random", "successive_halving", "hyperband", "asha") if name in _searched(results)
    ]
    if "random" not in names:
        return None
    config = results.config
    late = [[trace.utilisation for trace in stragglers.traces(results, name)] for name in names]
    return Bars(
        "Workers that wait for stragglers",
        "utilisation (ratio)",
        [TITLES[name] for name in names],
        {
            "nobody is late": [
                stragglers.simulated(results, name, 0, late=False).utilisation for name in names
            ],
            "some are late": [sum(draws) / len(draws) for draws in late],
        },
        note=f"simulated: {config.simulated_workers} workers, {config.late_probability:.0%} of jobs "
        f"{config.late_factor:g} times as long",
    )


def _start(results: Results) -> Figure | None:
    starts = [values_of(results, f"{SEARCH}/random", name) for name in ("cluster_start_s", "workers_start_s")]
    note = f"{results.config.peer_trials} whole trainings of the same trials"
    if all(starts):
        note += (
            f"; starting Ray took {starts[0][-1]:.1f} s and warming the workers {starts[1][-1]:.1f} s, once"
        )
    default, warm = f"{START}/ray_tune", f"{START}/warm_workers"
    if results.has(default, warm):
        share = 1 - results.seconds(warm).value / results.seconds(default).value
        note += (
            f"; {share:.0%} of the time of Ray Tune's default is not training: its own start (imports in the "
            "driver are not counted), each trial's process and imports, and what it does between trials"
        )
    return measured_and_predicted(
        results, results.variants(START), "A process a trial, or warm workers", note=note
    )


def _together(results: Results) -> Figure | None:
    note = f"{TOGETHER_STEPS} steps and a loss of {results.config.together} trials that are made already"
    return measured_and_predicted(
        results, results.variants(TOGETHER), "One after another, or in one step", note=note
    )


def _fidelity(results: Results) -> Figure | None:
    """Cost and rank correlation of each cheaper axis; fewer steps from the full curves."""
    names = [name for name in FIDELITIES if curves.ends(results, f"{FIDELITY}/{name}")]
    if not names or "random" not in _searched(results):
        return None
    config = results.config
    most = config.most_steps
    whole = [curve[most] for curve in curves.whole_curves(results)]
    costs, agreements = [], []
    for name in names:
        mine = curves.curves(results, f"{FIDELITY}/{name}")
        losses = [mine.get(trial, {}).get(most, float("inf")) for trial in range(len(whole))]
        share = curves.share_of_random(results, f"{FIDELITY}/{name}")
        costs.append(share.value if share else NAN)
        agreements.append(curves.rank_correlation(losses, whole))
    for step in config.rungs()[:-1]:
        names.append(f"{step} of {most} steps")
        costs.append(step / most)
        agreements.append(curves.with_the_end(results, step))
    return Bars(
        "Cheaper fidelities",
        "ratio",
        names,
        {"cost, of the whole": costs, "rank correlation with the whole": agreements},
        note=f"all {config.configurations} configurations on each; steps are counted, the others measured",
    )
