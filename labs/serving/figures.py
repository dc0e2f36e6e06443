"""The pictures: how long tokens take under each policy, whether that was told, and where each layout wins."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import Bars, Chart, Figure, Series
from labs.lab import Results, values_of
from labs.serving import claims, derived, extrapolation
from labs.serving.layout import POLICIES
from labs.serving.model import predict
from labs.serving.ways import SIMULATED

SWEEPS = f"{SIMULATED}/sweeps"
AXES = {
    "workers": ("Goodput over the number of workers", "workers"),
    "prefill": ("Goodput over the workers that read, of 8", "prefill workers"),
    "common": ("Goodput over the share of prompts that begin alike, 8 workers", "mean common share"),
    "link": ("Goodput over the bandwidth of the link, 8 workers", "bandwidth over the measured one (x)"),
}


def figure(results: Results) -> Sequence[Figure]:
    """Every figure that the results allow."""
    found = [
        _times(results, "ttft", "Time to the first token"),
        _times(results, "itl", "Gaps between tokens"),
    ]
    found += [_told(results), _goodput(results), _memory(results), _neighbours(results), _map(results)]
    found += [_sweep(results, name) for name in AXES]
    return [each for each in found if each is not None]


def _policies(results: Results) -> list[str]:
    return [policy for policy in POLICIES if values_of(results, derived.live_address(policy), "itl_p50_s")]


def _times(results: Results, key: str, title: str) -> Figure | None:
    policies = _policies(results)
    if not policies:
        return None
    kinds = ("p50", "p99") if key == "ttft" else ("p50", "p99", "max")
    series = {
        kind: [values_of(results, derived.live_address(p), f"{key}_{kind}_s")[-1] for p in policies]
        for kind in kinds
    }
    config = results.config
    void = [policy for policy in policies if derived.void(results, policy)]
    requests = min(len(values_of(results, derived.live_address(p), "ttft_s")) for p in policies)
    note = (
        f"{config.rate:g} requests/s, prompts of {config.prompt} and outputs of {config.output} tokens on "
        f"average, {config.workers} workers; the same requests under each policy"
    )
    if key == "ttft" and requests < 100:
        note += f". p99 of {requests} requests is the longest of them"
    refused = values_of(results, derived.CALIBRATION, "refused")
    if refused and refused[-1]:
        note += ". Not simulated: calibration was refused, other programs were busy"
    if void:
        note += f". Void, the load generator was late: {', '.join(void)}"
    return Bars(f"{title} under each policy", "time (s)", policies, series, log=True, note=note)


def _told(results: Results) -> Figure | None:
    policies = [policy for policy in _policies(results) if derived.in_simulator(results, policy)]
    if not policies:
        return None
    formulas = {each.key: each.value for each in predict(results.config, results.machine)}
    labels, measured, said, before = [], [], [], []
    for policy in policies:
        for key in derived.MEDIANS:
            labels.append(f"{policy}: {key}")
            rows = [getattr(each, key) for each in derived.in_simulator(results, policy)]
            said.append(sorted(rows)[len(rows) // 2])
            measured.append(values_of(results, derived.live_address(policy), f"{key}_s")[-1])
            before.append(formulas[f"{policy}_{key}_s"])
    return Bars(
        "Medians measured, simulated with fitted costs, and from the machine's constants",
        "time (s)",
        labels,
        {"measured": measured, "simulated": said, "from constants": before},
        log=True,
        note="costs were fitted to other requests, before",
    )


def _goodput(results: Results) -> Figure | None:
    policies = _policies(results)
    rows = {
        policy: values_of(results, derived.live_address(policy), "block_met_requests_per_s")
        for policy in policies
    }
    if not policies or not all(rows.values()):
        return None
    config = results.config
    shares = (values_of(results, derived.live_address(policy), "attained_fraction") for policy in policies)
    return Bars(
        "Requests that met both limits",
        "rate (requests/s)",
        policies,
        {"met both": [sorted(row)[len(row) // 2] for row in rows.values()]},
        note=f"offered {config.rate:g}/s; first token within {config.ttft_ms:g} ms, 99 % of a request's "
        f"gaps within {config.itl_ms:g} ms; median of blocks. Share of all requests that did: "
        + ", ".join(f"{policy} {row[-1]:.0%}" for policy, row in zip(policies, shares, strict=True) if row),
    )


def _memory(results: Results) -> Figure | None:
    """KV occupancy, and what a hand-over takes."""
    policies = _policies(results)
    held = {p: values_of(results, derived.live_address(p), "occupancy_fraction") for p in policies}
    if not policies or not all(held.values()):
        return None
    note = f"of {results.config.blocks} blocks on each worker, mean over steps"
    sent = values_of(results, derived.live_address("disaggregated"), "handed_B")
    takes = values_of(results, derived.live_address("disaggregated"), "hand_over_p50_s")
    if sent and takes:
        note += (
            f"; disaggregated: {sent[-1] / 2**20:.1f} MiB handed over, {1e3 * takes[-1]:.1f} ms each "
            "(median, without packing)"
        )
    shares = [row[-1] for row in held.values()]
    return Bars(
        "Keys and values held", "share of the cache (fraction)", policies, {"held": shares}, note=note
    )


def _neighbours(results: Results) -> Figure | None:
    ratio = derived.penalty(results)
    if ratio is None:
        return None
    return Bars(
        "What a neighbour on the same socket costs",
        "time over that alone (ratio)",
        ["decode of 8 sequences on every worker at once"],
        {"measured": [ratio.value], "lowest": [ratio.low], "highest": [ratio.high]},
        note="1: workers take nothing from each other; bounds: the range over rounds",
    )


def _map(results: Results) -> Figure | None:
    rows = {case: claims.spread(row) for case, row in claims.map_ratios(results).items()}
    if not rows:
        return None
    missing = len(extrapolation.map_cases(results.config)) - len(rows)
    return Bars(
        "Winner map: goodput of disaggregated over colocated workers",
        "goodput over the best colocated layout's (ratio)",
        [f"prompt {case.prompt}, output {case.output}, {case.limits} limits" for case in rows],
        {
            "as measured": [ratio.value for ratio in rows.values()],
            "lowest under changes": [ratio.low for ratio in rows.values()],
            "highest under changes": [ratio.high for ratio in rows.values()],
        },
        note=f"simulated with {_origin(results, claims.MAP)}, 2 workers; above 1 disaggregation wins. "
        f"Goodput: the highest rate at which {extrapolation.ATTAINED:.0%} of requests meet both limits, to "
        f"{extrapolation.GRAIN:.0%}. Colocated: the better of whole prompts and chunks of "
        f"{', '.join(map(str, extrapolation.CHUNKS))}. Changes: another seed; costs of reading or writing "
        "25 % higher"
        + (f". Left out, colocated workers attain them at no rate: {missing} cases" * (missing > 0)),
    )


def _origin(results: Results, variant: str) -> str:
    """Of the costs that a simulation was run with."""
    fitted = values_of(results, variant, "fitted")
    return "fitted costs" if fitted and fitted[-1] else "costs from the machine's constants"


def _sweep(results: Results, name: str) -> Figure | None:
    x = values_of(results, SWEEPS, f"{name}_x")
    if not x:
        return None
    title, label = AXES[name]
    series = [
        Series(kind, x, values_of(results, SWEEPS, f"{name}_{kind}_requests_per_s"), "line")
        for kind in (extrapolation.COLOCATED, extrapolation.DISAGGREGATED)
    ]
    return Chart(
        title,
        label,
        "goodput (requests/s)",
        series,
        x_log=name in ("workers", "link"),
        note=f"simulated with {_origin(results, SWEEPS)}; each kind with its best chunk size or ratio of "
        f"workers; goodput as in the winner map, to {extrapolation.GRAIN:.0%}",
    )
