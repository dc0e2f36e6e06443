"""Memory in stacked parts, bytes, the table of ours against PyTorch's, and the stragglers."""

from __future__ import annotations

from collections.abc import Sequence

from labs.data_parallel import straggling
from labs.data_parallel.claims import PAIRS
from labs.data_parallel.holding import PARTS
from labs.data_parallel.ways import BACKENDS
from labs.figure import Bars, Figure, measured_and_predicted
from labs.lab import Interval, Results, values_of

MEBIBYTE = 2**20


def figure(results: Results) -> Sequence[Figure]:
    drawn = [_memory(results), _bytes(results), _steps(results), _comparison(results), _straggler(results)]
    return [each for each in drawn if each is not None]


def _recorded(results: Results, address: str, key: str) -> float:
    values = values_of(results, address, key)
    return values[-1] if values else float("nan")


def _memory(results: Results) -> Figure | None:
    addresses = list(results.variants("memory"))
    if not addresses:
        return None
    series = {
        part: [_recorded(results, address, f"{part}_B") / MEBIBYTE for address in addresses] for part in PARTS
    }
    return Bars(
        "What a rank holds",
        "memory (MiB)",
        [address.partition("/")[2] for address in addresses],
        series,
        note="live storages of rank 0, each once",
        stacked=True,
    )


def _bytes(results: Results) -> Figure | None:
    addresses = list(results.variants("bytes"))
    if not addresses:
        return None
    values = [_recorded(results, address, "communicated_B") / MEBIBYTE for address in addresses]
    names = [address.partition("/")[2] for address in addresses]
    note = "payload: the larger of input and output of each call"
    return Bars("Communicated in a step", "payload (MiB)", names, {"counted": values}, note=note)


def _steps(results: Results) -> Figure | None:
    title = f"A step of {results.config.tokens} tokens a rank"
    return measured_and_predicted(results, results.variants("step"), title)


def verdict(ratio: Interval) -> str:
    return "won" if ratio.high < 1 else "lost" if ratio.low > 1 else "cannot tell"


def _comparison(results: Results) -> Figure | None:
    """Every line, won or lost: ours against PyTorch's of the same strategy."""
    labels: list[str] = []
    ratios: list[Interval] = []
    for ours, theirs in PAIRS:
        lines = [(f"{ours}_{backend}", f"{theirs}_{backend}") for backend in BACKENDS]
        lines += [(f"{ours}_shm", f"{theirs}_gloo"), (f"{theirs}_shm", f"{theirs}_gloo")]
        for new, base in lines:
            if results.has(f"step/{new}", f"step/{base}"):
                ratio = results.ratio(f"step/{new}", f"step/{base}")
                ratios.append(ratio)
                labels.append(f"{new} / {base}: {verdict(ratio)}")
    if not labels:
        return None
    return Bars(
        "Ours and PyTorch's",
        "time / time (ratio)",
        labels,
        {
            "ratio": [ratio.value for ratio in ratios],
            "95 % from": [ratio.low for ratio in ratios],
            "95 % to": [ratio.high for ratio in ratios],
        },
        note="below 1: the first is faster. The last line of each strategy is PyTorch's own on our shm.",
    )


def _straggler(results: Results) -> Figure | None:
    addresses = [f"straggler/{name}" for name in straggling.WAYS if results.has(f"straggler/{name}")]
    if not addresses:
        return None
    config = results.config
    return Bars(
        f"Until a loss of {config.target_loss:g} with late ranks",
        "time (s)",
        [
            f"{address.partition('/')[2]}: {_recorded(results, address, 'steps'):.0f} steps"
            for address in addresses
        ],
        {
            "measured": [_recorded(results, address, "target_s") for address in addresses],
            "steps x predicted step": [
                _recorded(results, address, "steps") * (results.predicted(address, "step_s") or float("nan"))
                for address in addresses
            ],
        },
        note=f"each rank late by {config.late_s:g} s in {config.late_probability:.0%} of its steps",
    )
