"""Proof: the losses that methods report are those of trainings without a stop, in one process.

A search's best trial is trained again by itself, through the same points and steps: to promote a trial, to
send its state to another worker or to copy it must change nothing. What runs in JAX is held against torch in
float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from labs.lab import Check
from labs.tuning.config import Config
from labs.tuning.training import Task, Training, one_thread
from labs.tuning.ways import (
    FIDELITIES,
    FIDELITY,
    SEARCH,
    START,
    TOGETHER_STEPS,
    Trained,
    cheaper,
)

SAME = 1e-4  # nats; the same operations on the same numbers, but for how many threads share them
ROUNDED = 2e-3  # nats; float32 against float64 after a few steps of AdamW, whose first go by signs alone
AGAINST = {SEARCH: "one training without a stop", FIDELITY: "one training without a stop"}


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest difference in a loss, in nats."""
    found = []
    for address, output in outputs.items():
        group, _, name = address.partition("/")
        if group in (SEARCH, FIDELITY):
            if (
                not isinstance(output, Trained)
                or not output.jobs
                or output.jobs[-1].stop != config.most_steps
            ):
                raise TypeError(f"{address} returned no trial that was trained for {config.most_steps} steps")
            task = cheaper(config, name) if name in FIDELITIES else config.task()
            error = _furthest(output.losses, again(task, output))
            found.append(Check(address, error, SAME, AGAINST[group]))
            continue
        if group == START:
            points, stop, dtype, tolerance = config.points(config.peer_trials), config.most_steps, None, SAME
        else:
            points, stop, tolerance = config.points(config.together), TOGETHER_STEPS, ROUNDED
            dtype = "float64"
        expected = _expected(config, tuple(points), stop, dtype)
        against = f"torch in {dtype}" if dtype else "one process, one after another"
        found.append(Check(address, _furthest(output, expected), tolerance, against))
    return found


def _furthest(found: Any, expected: Sequence[float]) -> float:
    """The largest difference, NaN where only one is NaN; TypeError: they are not as many."""
    if not isinstance(found, Sequence) or len(found) != len(expected):
        raise TypeError(f"{found!r} are no {len(expected)} losses")
    pairs = list(zip(found, expected, strict=True))
    differences = [0.0 if mine != mine and other != other else abs(mine - other) for mine, other in pairs]
    return max(differences) if all(each == each for each in differences) else float("nan")


def again(task: Task, trained: Trained) -> list[float]:
    """The loss after each job, from one training that never leaves this process."""
    losses = []
    with one_thread():
        training = Training(task, trained.jobs[0].point)
        for job in trained.jobs:
            training.become(job.point)
            training.advance(job.stop)
            losses.append(training.loss())
    return losses


_known: dict[Any, list[float]] = {}


def _expected(config: Config, points: tuple[Any, ...], stop: int, dtype: str | None) -> list[float]:
    """Losses after ``stop`` steps of each point's own training."""
    import torch

    task = replace(config.task(), milestones=())
    key = task, points, stop, dtype
    if key not in _known:
        losses = []
        with one_thread():
            for point in points:
                training = Training(task, point, dtype=getattr(torch, dtype) if dtype else None)
                training.advance(stop)
                losses.append(training.loss())
        _known[key] = losses
    return _known[key]
