"""Which schedule is fastest for given stage times, links and memory: all that there are, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.schedules.actions import Kind, Schedule
from parallel.schedules.algorithms import NAMES, allows, build
from parallel.schedules.simulator import Durations, Link, peak_activations, per_stage, simulate


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered. step: s. bubble: idle share of it. peak: most activations on a rank,
    in the units asked for."""

    schedule: Schedule
    stages_per_rank: int
    step: float
    bubble: float
    peak: float
    fits: bool


@dataclass(frozen=True)
class Choice:
    """The fastest that fits, and everything that it was chosen from, the fastest first."""

    best: Candidate
    considered: tuple[Candidate, ...]


def best_schedule(
    stages: int,
    microbatches: int,
    durations: Durations,
    memory_limit: float | None = None,
    *,
    world_size: int | None = None,
    size: float | Sequence[float] = 1,
    kept: float = 1.0,
    link: Link | None = None,
    overhead: float = 0.0,
) -> Choice:
    """The fastest schedule whose activations fit in ``memory_limit`` on every rank; None: no limit.

    stages: pieces that the model is cut into; durations, size and the link's bytes are theirs. world_size:
    ranks, as many as stages by default. A schedule with fewer stages than pieces takes neighbours as one.
    size, kept: as in ``peak_activations``. link, overhead: as in ``simulate``.

    Nothing is guessed: every schedule of NAMES that the pieces allow is simulated.
    ValueError: pieces that do not divide among the ranks, or none that fits.
    """
    world_size = stages if world_size is None else world_size
    if stages < 1 or world_size < 1 or stages % world_size:
        raise ValueError(f"{stages} stages do not divide among {world_size} ranks")
    considered = []
    for name, per_rank in _possible(stages // world_size):
        schedule = build(name, world_size, microbatches, per_rank)
        joined = stages // schedule.stages
        timeline = simulate(
            schedule,
            _merged_durations(durations, stages, joined),
            _merged_link(link, stages, joined),
            overhead,
        )
        sizes = per_stage(size, stages, "sizes").reshape(-1, joined).sum(1).tolist()
        peak = float(peak_activations(schedule, sizes, kept).max())
        fits = memory_limit is None or peak <= memory_limit
        considered.append(Candidate(schedule, per_rank, timeline.step, timeline.bubble, peak, fits))
    considered.sort(key=lambda candidate: (candidate.step, candidate.peak))
    best = next((candidate for candidate in considered if candidate.fits), None)
    if best is None:
        least = min(considered, key=lambda candidate: candidate.peak)
        raise ValueError(
            f"no schedule holds its activations in {memory_limit:g}; "
            f"{least.schedule.name} needs least, {least.peak:g}"
        )
    return Choice(best, tuple(considered))


def _possible(pieces: int) -> list[tuple[str, int]]:
    """(name, stages a rank) of the schedules for a rank of ``pieces`` pieces."""
    found = []
    for name in NAMES:
        for count in range(1, pieces + 1):
            if pieces % count == 0 and allows(name, count):
                found.append((name, count))
    return found


def _merged_durations(durations: Durations, stages: int, joined: int) -> Durations:
    """Of ``joined`` neighbours as one stage."""
    table = durations.table(stages).reshape(4, -1, joined).sum(2).tolist()
    return Durations(
        table[Kind.FORWARD], table[Kind.INPUT_GRADIENT], table[Kind.WEIGHT_GRADIENT], table[Kind.BACKWARD]
    )


def _merged_link(link: Link | None, stages: int, joined: int) -> Link | None:
    """With the bytes that leave the last of ``joined`` neighbours."""
    if link is None:
        return None
    size = per_stage(link.activation_bytes, stages, "bytes")
    return replace(link, activation_bytes=size[joined - 1 :: joined].tolist())
