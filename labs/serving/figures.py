"""The pictures: how long tokens take under each policy, whether that was told, and where each layout wins."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import NAN, Bars, Chart, Figure, Series
from labs.lab import Results
from labs.serving import claims, derived, extrapolation
from labs.serving.layout import POLICIES
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
    return [policy for policy in POLICIES if results.recorded(derived.live_address(policy), "itl_p50_s")]


def _times(results: Results, key: str, title: str) -> Figure | None:
    policies = _policies(results)
    if not policies:
        return None
    kinds = ("p50", "p99") if key == "ttft" else ("p50", "p99", "max")
    series = {
        kind: [results.recorded(derived.live_address(p), f"{key}_{kind}_s")[-1] for p in policies]
        for kind in kinds
    }
    config = results.config
    void = [policy for policy in policies if derived.void(results, policy)]
    note = (
        f"{config.rate:g} requests/s, prompts of {config.prompt} and outputs of {config.output} tokens on "
        f"average, {config.workers} workers; the same requests under each policy"
    )
    refused = results.recorded(derived.CALIBRATION, "refused") if results.has(derived.CALIBRATION) else ()
    if refused and refused[-1]:
        note += ". Not simulated: calibration was refused, other programs were busy"
    if void:
        note += f". Void, the load generator was late: {', '.join(void)}"
    return Bars(f"{title} under each policy", "time (s)", policies, series, log=True, note=note)


def _told(results: Results) -> Figure | None:
    policies = [policy for policy in _policies(results) if derived.in_simulator(results, policy)]
    if not policies:
        return None
    labels, measured, said, before = [], [], [], []
    for policy in policies:
        for key in derived.MEDIANS:
            labels.append(f"{policy}: {key}")
            rows = [getattr(each, key) for each in derived.in_simulator(results, policy)]
            said.append(sorted(rows)[len(rows) // 2])
            measured.append(results.recorded(derived.live_address(policy), f"{key}_s")[-1])
            before.append(results.predicted(derived.live_address(policy), f"{key}_s") or NAN)
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
        policy: results.recorded(derived.live_address(policy), "block_goodput_requests_per_s")
        for policy in policies
    }
    if not policies or not all(rows.values()):
        return None
    config = results.config
    return Bars(
        "Requests that met both limits",
        "rate (requests/s)",
        policies,
        {"goodput": [sorted(row)[len(row) // 2] for row in rows.values()]},
        note=f"offered {config.rate:g}/s; first token within {config.ttft_ms:g} ms, 99 % of a request's "
        f"gaps within {config.itl_ms:g} ms; median of blocks",
    )


def _memory(results: Results) -> Figure | None:
    """KV occupancy, and what a hand-over takes."""
    policies = _policies(results)
    held = {p: results.recorded(derived.live_address(p), "occupancy_fraction") for p in policies}
    if not policies or not all(held.values()):
        return None
    note = f"of {results.config.blocks} blocks on each worker, mean over steps"
    sent = results.recorded(derived.live_address("disaggregated"), "handed_B")
    takes = results.recorded(derived.live_address("disaggregated"), "hand_over_p50_s")
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
        note="1: workers take nothing from each other; bounds of the 95 % interval",
    )


def _map(results: Results) -> Figure | None:
    rows = claims.map_rows(results)
    if not rows:
        return None
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
        f"Colocated: the better of whole prompts and "
        "chunks of "
        f"{', '.join(map(str, extrapolation.CHUNKS))}. Changes: another seed; costs of reading or writing "
        "25 % higher",
    )


def _origin(results: Results, variant: str) -> str:
    """Of the costs that a simulation was run with."""
    fitted = results.recorded(variant, "fitted")
    return "fitted costs" if fitted and fitted[-1] else "costs from the machine's constants"


def _sweep(results: Results, name: str) -> Figure | None:
    x = results.recorded(SWEEPS, f"{name}_x") if results.has(SWEEPS) else []
    if not x:
        return None
    title, label = AXES[name]
    series = [
        Series(kind, x, results.recorded(SWEEPS, f"{name}_{kind}_requests_per_s"), "line")
        for kind in (extrapolation.COLOCATED, extrapolation.DISAGGREGATED)
    ]
    return Chart(
        title,
        label,
        "goodput (requests/s)",
        series,
        x_log=name in ("workers", "link"),
        note=f"simulated with {_origin(results, SWEEPS)}; each kind with its best chunk size or ratio of "
        f"workers",
    )
