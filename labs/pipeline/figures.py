"""The pictures: what was predicted above what was measured, rank by rank; step times; where they are lost;
what is held."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import NAN, Bars, Figure, Span, Timeline
from labs.lab import Results, values_of
from labs.pipeline import derived, lost_time, simulated
from labs.pipeline.claims import held
from labs.pipeline.config import MODELS
from labs.pipeline.running import VIRTUAL

KIND_NAMES = ("forward", "backward", "input gradient", "weight gradient")
SHOWN = ("1f1b", "interleaved_1f1b", "zb_v", "v_half")
"""Schedules whose timelines are drawn when all are run."""
TITLES = {"gpt": "GPT", "encoder_decoder": "Encoder-decoder", VIRTUAL: "Virtual devices"}
MEBIBYTE = 2**20


def figure(results: Results) -> Sequence[Figure]:
    """Timelines first."""
    names = results.config.names(results.config.ranks)
    shown = [name for name in names if name in SHOWN] or list(names)
    found: list[Figure | None] = [_timeline(results, name) for name in shown]
    found += [_steps(results, group) for group in (VIRTUAL, *MODELS)]
    found += [_lost(results), _in_flight(results), *(_held(results, model) for model in MODELS)]
    return [each for each in found if each is not None]


def _timeline(results: Results, name: str) -> Figure | None:
    """Predicted above measured, on virtual devices."""
    config, address = results.config, f"{VIRTUAL}/{name}"
    measured = [lost_time.spans(results, address, rank) for rank in range(config.ranks)]
    if not results.has(address) or not all(measured):
        return None
    schedule = config.schedule_of(name, config.ranks)
    durations = simulated.virtual_durations(config, schedule)
    said = simulated.timeline(results.machine, schedule, durations, 0.0)
    rows: list[tuple[str, list[Span]]] = []
    for rank in range(config.ranks):
        mine = said.rank == rank
        columns = (said.start[mine].tolist(), said.end[mine].tolist(), said.kind[mine].tolist())
        spans = [Span(begin, end, KIND_NAMES[kind]) for begin, end, kind in zip(*columns, strict=True)]
        rows.append((f"predicted, rank {rank}", spans))
    for rank, spans_of_rank in enumerate(measured):
        actions = schedule.actions(rank)
        spans = [
            Span(begin, end, KIND_NAMES[action.kind])
            for action, (begin, end) in zip(actions, spans_of_rank, strict=True)
        ]
        rows.append((f"measured, rank {rank}", spans))
    end = max(span.end for _, spans in rows[config.ranks :] for span in spans)
    note = (
        f"Virtual devices: {config.ranks} ranks whose forward is set to {config.unit_ms:g} ms, each gradient "
        f"too; {schedule.microbatches} micro-batches, {schedule.stages} stages. Predicted "
        f"{1e3 * said.step:.0f} ms, measured {1e3 * end:.0f} ms."
    )
    return Timeline(f"{name}: predicted above measured", rows, note=note)


def _steps(results: Results, group: str) -> Figure | None:
    """Step times: measured, predicted beforehand, and simulated from stage times."""
    addresses = list(results.variants(group))
    if not addresses:
        return None
    names = [address.partition("/")[2] for address in addresses]
    series = {
        "measured": [results.seconds(address).value for address in addresses],
        "predicted": [results.predicted(address) or NAN for address in addresses],
    }
    config = results.config
    if group == VIRTUAL:
        kind = f"virtual devices: {config.ranks} ranks whose work is a set time, not computed"
    else:
        kind = f"real stages on {config.stages} ranks"
        series["simulated from stage times"] = [
            derived.from_stage_times(results, group, name) or NAN for name in names
        ]
    return Bars(f"{TITLES[group]}: a step under each schedule", "time (s)", names, series, note=kind)


def _lost(results: Results) -> Figure | None:
    """Bubble and overhead as two numbers, beside each other."""
    addresses = [address for group in (VIRTUAL, *MODELS) for address in results.variants(group)]
    addresses = [address for address in addresses if values_of(results, address, "bubble_ratio")]
    if not addresses:
        return None
    config = results.config
    bubbles, shares = [], []
    for address in addresses:
        group, _, name = address.partition("/")
        world_size = config.ranks if group == VIRTUAL else config.stages
        schedule = config.schedule_of(name, world_size)
        actions = sum(map(len, schedule.ranks)) / world_size
        end = max(span[1] for rank in range(world_size) for span in lost_time.spans(results, address, rank))
        bubbles.append(results.recorded(address, "bubble_ratio")[-1])
        shares.append(results.recorded(address, "overhead_s")[-1] * actions / end)
    return Bars(
        "What is lost of a step",
        "share of all ranks' time (ratio)",
        addresses,
        {"bubble: waits for another rank": bubbles, "overhead: could begin, has not yet": shares},
        note="of the step that was recorded action by action; virtual: devices whose work is a set time",
        stacked=True,
    )


def _in_flight(results: Results) -> Figure | None:
    """The most activations that a rank holds, on virtual devices."""
    names = [name for name in results.config.names(results.config.ranks) if held(results, name) is not None]
    if not names:
        return None
    counts = [held(results, name) or 0.0 for name in names]
    return Bars(
        "What the fullest rank holds",
        "micro-batches through a rank's whole share (activations)",
        names,
        {"counted": counts},
        note=f"{results.config.ranks} ranks, {results.config.microbatches} micro-batches; a schedule with "
        "two stages a rank counts halves",
    )


def _held(results: Results, model: str) -> Figure | None:
    """The same in bytes, on real stages."""
    addresses = [address for address in results.variants(model) if values_of(results, address, "held_B")]
    if not addresses:
        return None
    return Bars(
        f"{TITLES[model]}: what the fullest rank holds for backward",
        "memory (MiB)",
        [address.partition("/")[2] for address in addresses],
        {
            "counted": [results.recorded(address, "held_B")[-1] / MEBIBYTE for address in addresses],
            "predicted": [(results.predicted(address, "held_B") or NAN) / MEBIBYTE for address in addresses],
        },
        note="counted: torch's storages that come and go in a step, gradients of weights not among them",
    )
