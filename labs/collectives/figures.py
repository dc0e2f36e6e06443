"""The pictures: two lanes of layers, sum and maximum, time over size, every collective in every way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from labs.collectives import derived, model, overlap
from labs.collectives.config import FLOAT, SMALL_KIB
from labs.collectives.ways import OPERATIONS, SWEEP, SWEEP_WAYS, more_group, ways_of
from labs.figure import Chart, Figure, Series, Span, Timeline, measured_and_predicted
from labs.lab import Results, values_of

TITLES = {
    "waited": "waited for at once: the two take turns",
    "asynchronous": "asynchronous: one layer communicates while the next computes",
}
COMPUTE = {"virtual": "Virtual compute", "matmul": "Products on a core"}


def figure(results: Results) -> Sequence[Figure]:
    found: list[Figure] = []
    for kind in overlap.KINDS:
        found += [lane for name in TITLES for lane in _lanes(results, kind, name)]
    shares = [(kind, derived.hidden(results, kind)) for kind in overlap.KINDS]
    layers = measured_and_predicted(
        results,
        [f"overlap_{kind}/{name}" for kind in overlap.KINDS for name in overlap.NAMES],
        f"{results.config.layers} layers: the sum, and the longer of the two",
        log=True,
        note="; ".join(f"{COMPUTE[kind]}: {share.value:.0%} hidden" for kind, share in shares if share),
    )
    found += [layers] if layers else []
    found += _sizes(results)
    for title, operations in (
        ("One rank has it, or one needs it", ("broadcast", "scatter", "gather", "reduce")),
        ("All need it", ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")),
    ):
        names = [f"{name}/{way}" for name in OPERATIONS if name in operations for way in ways_of(name)]
        title = f"{title}: {results.config.size_KiB} KiB in all"
        bars = measured_and_predicted(results, names, title, log=True)
        found += [bars] if bars else []
    found += _ranks(results)
    return found


def spans(results: Results, variant: str, lane: str) -> list[Span]:
    """Rank 0's intervals of one step, from the step's beginning: a collective's from when it was started, or
    from when the link was free of the one before, unless it was through before that one."""
    layers = results.config.layers
    found: list[Span] = []
    first = next(iter(values_of(results, variant, "compute_begin_s")), 0.0)
    begins, ends = (values_of(results, variant, f"{lane}_{edge}_s")[:layers] for edge in ("begin", "end"))
    for begin, end in zip(begins, ends, strict=False):
        begin, end = begin - first, end - first
        free = found[-1].end if found else 0.0
        found.append(Span(max(begin, free) if free <= end else begin, end))
    return found


def _lanes(results: Results, kind: str, name: str) -> list[Figure]:
    variant = f"overlap_{kind}/{name}"
    if not results.has(variant):
        return []
    rows = [(lane, spans(results, variant, lane)) for lane in ("compute", "communication")]
    if not all(row for _, row in rows):
        return []
    note = f"Rank 0 of {results.config.ranks}, one step of {results.config.layers} layers."
    return [Timeline(f"{COMPUTE[kind]}, {TITLES[name]}", rows, note=note)]


def _sizes(results: Results) -> list[Figure]:
    config, series, notes = results.config, [], []
    for way in SWEEP_WAYS:
        measured = [kib for kib in config.sweep_KiB if results.has(f"{SWEEP}/{way}_{kib}")]
        if not measured:
            continue
        times = [results.seconds(f"{SWEEP}/{way}_{kib}") for kib in measured]
        sizes = [float(derived.size_of(results, kib)) for kib in measured]
        series.append(
            Series(
                way,
                sizes,
                [time.value for time in times],
                low=[time.low for time in times],
                high=[time.high for time in times],
            )
        )
        fitted = derived.fit(results, way)
        if fitted:
            alpha, beta = (interval.value for interval in fitted)
            all_sizes = [float(derived.size_of(results, kib)) for kib in config.sweep_KiB]
            line = [alpha + beta * size for size in all_sizes]
            series.append(Series(f"{way}, fitted on the small ones", all_sizes, line, "dashed"))
            notes.append(f"{way}: {1e6 * alpha:.3g} us + {1e9 * beta:.3g} ns/B")
    if not series:
        return []
    note = f"alpha and beta fitted on {SMALL_KIB[0]} to {SMALL_KIB[-1]} KiB. " + "; ".join(notes)
    title = f"All-reduce on {config.ranks} ranks: the small ones predict the large one"
    return [Chart(title, "size (B)", "time (s)", series, x_log=True, y_log=True, note=note)]


def _ranks(results: Results) -> list[Figure]:
    """All-reduce over the number of ranks: measured where it was, else only predicted."""
    config, series = results.config, []
    for way in SWEEP_WAYS:
        measured, predicted = [], []
        places = {config.ranks: f"all_reduce/{way}"}
        if config.more_ranks:
            places[config.more_ranks] = f"{more_group(config.more_ranks)}/{way}"
        for ranks, address in sorted(places.items()):
            if results.has(address):
                measured.append((float(ranks), results.seconds(address).value))
        for ranks in sorted({*places, 3, 4}):
            size = FLOAT * config.elements(ranks, config.size_KiB)
            value, _ = model.seconds(results.machine, "all_reduce", way, size, ranks)
            predicted.append((float(ranks), value))
        if measured:
            series.append(_points(way, measured, "points"))
            series.append(_points(f"{way}, predicted", predicted, "dashed"))
    if not series:
        return []
    note = "" if config.more_ranks else "3 and 4 ranks are predicted only: not measured (more_ranks=0)."
    title = f"All-reduce of {config.size_KiB} KiB on more ranks"
    return [Chart(title, "ranks (processes)", "time (s)", series, y_log=True, note=note)]


def _points(name: str, points: Sequence[tuple[float, float]], style: Literal["points", "dashed"]) -> Series:
    return Series(name, [x for x, _ in points], [y for _, y in points], style)
