"""Time against length with its crossovers; the first call beside the others; what was counted."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import Bars, Chart, Figure, Series, measured_and_predicted
from labs.lab import Results
from labs.programming_models import chain
from labs.programming_models.payback import COMPILED, breakeven
from labs.programming_models.ways import NETWORKS


def figure(results: Results) -> Sequence[Figure]:
    drawn: list[Figure] = [_lengths(results)]
    for group in NETWORKS:
        title = group.replace("_", " ")
        if times := measured_and_predicted(results, results.variants(group), title, log=True):
            drawn.append(times)
    drawn += _paying(results)
    counted = _counted(results)
    return [*drawn, counted] if counted.labels else drawn


def _lengths(results: Results) -> Chart:
    series = []
    for name in chain.NAMES:
        points = [
            (float(size), f"chain_{size}/{name}")
            for size in results.config.sizes
            if results.has(f"chain_{size}/{name}")
        ]
        if not points:
            continue
        seconds = [results.seconds(address) for _, address in points]
        lengths = [length for length, _ in points]
        series.append(
            Series(
                name,
                lengths,
                [interval.value for interval in seconds],
                "line",
                low=[interval.low for interval in seconds],
                high=[interval.high for interval in seconds],
            )
        )
        predicted = [results.predicted(address) for _, address in points]
        if name in ("torch", "torch_compile") and all(value is not None for value in predicted):
            series.append(Series(f"{name}, predicted", lengths, [v or 0.0 for v in predicted], "dashed"))
    return Chart(
        "Twelve elementwise operations: flat is overhead, sloping is bytes",
        "length (numbers)",
        "time (s)",
        series,
        x_log=True,
        y_log=True,
        note="dashed: the predictions of eager torch and of torch.compile; all are in the table above",
    )


def _paying(results: Results) -> list[Figure]:
    names = [f"{size}, {name}" for size in results.config.sizes for name in COMPILED]
    found = [breakeven(results, size, name) for size in results.config.sizes for name in COMPILED]
    rows = [(name, calls.value) for name, calls in zip(names, found, strict=True) if calls is not None]
    if not rows:
        return []
    return [
        Bars(
            "Calls until the first one has paid",
            "calls (calls)",
            [name for name, _ in rows],
            {"measured": [calls for _, calls in rows]},
            log=True,
            note="length of the chain, and way; no bar: a call saves nothing, and compiling never pays",
        )
    ]


def _counted(results: Results) -> Bars:
    ways = [address for address in results.variants("new_shapes") if _graphs(results, address)]
    return Bars(
        f"Programs compiled for {results.config.shapes} shapes",
        "programs (programs)",
        [address.partition("/")[2] for address in ways],
        {"counted": [_graphs(results, address)[-1] for address in ways]},
    )


def _graphs(results: Results, address: str) -> Sequence[float]:
    recorded = results.info(address, "recorded", {})
    return recorded.get("graphs", ())
