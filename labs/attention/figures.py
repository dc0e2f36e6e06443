"""Time and memory against length; what each way buys at the longest."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import Bars, Chart, Figure, Series
from labs.lab import Results, values_of


def figure(results: Results) -> Sequence[Figure]:
    config = results.config
    drawn: list[Figure] = []
    for kind, title in (("full", "Every query sees every key"), ("token", "One more token")):
        names = (
            ("naive", "torch", "fused") if kind == "full" else ("recompute", "cache", "pages", "cache_int8")
        )
        drawn.append(_growth(results, kind, title, names))
    column = results.in_column("default")
    addresses = [
        address
        for address in column.variants()
        if address.endswith(f"_{config.length}/{address.rpartition('/')[2]}")
        and values_of(column, address, "extra_memory_B")
    ]
    if addresses:
        values = [column.recorded(address, "extra_memory_B")[-1] / 2**20 for address in addresses]
        drawn.append(
            Bars(
                f"Extra memory at {config.length} tokens",
                "memory (MiB)",
                addresses,
                {"measured": values},
                note="growth of the resident set during one call, default allocator",
            )
        )
    return drawn


def _growth(results: Results, kind: str, title: str, names: Sequence[str]) -> Chart:
    column = results.in_column("tuned") if results.in_column("tuned").variants() else results
    series = []
    for name in names:
        points = [
            (length, f"{kind}_{length}/{name}")
            for length in results.config.lengths
            if column.has(f"{kind}_{length}/{name}")
        ]
        if not points:
            continue
        seconds = [column.seconds(address) for _, address in points]
        lengths = [float(length) for length, _ in points]
        series.append(
            Series(
                name,
                lengths,
                [interval.value for interval in seconds],
                style="line",
                low=[interval.low for interval in seconds],
                high=[interval.high for interval in seconds],
            )
        )
        predicted = [column.predicted(address) for _, address in points]
        if all(value is not None for value in predicted):
            series.append(
                Series(f"{name}, predicted", lengths, [v or 0.0 for v in predicted], style="dashed")
            )
    return Chart(title, "length (tokens)", "time (s)", series, x_log=True, y_log=True)
