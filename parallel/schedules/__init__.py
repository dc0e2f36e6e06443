"""Pipeline schedules as data: one short file a schedule, what validates them, and what simulates them.

    schedule = schedules.build("zb_v", world_size=4, microbatches=16)
    timeline = schedules.simulate(schedule, schedules.Durations(1.0, 1.0, 1.0))
    timeline.step, timeline.bubble, schedules.peak_activations(schedule)
    runnable = schedules.with_communication(schedule)

``actions`` says what a schedule is and how its text looks; every schedule's file, where it comes from.
"""

from parallel.schedules.actions import COMPUTING, Action, Kind, Schedule, columns
from parallel.schedules.algorithms import (
    NAMES,
    activations,
    allows,
    bubble,
    build,
    usual_stages_per_rank,
)
from parallel.schedules.choice import Candidate, Choice, best_schedule
from parallel.schedules.communication import with_communication, without_communication
from parallel.schedules.simulator import Durations, Link, Timeline, peak_activations, simulate
from parallel.schedules.text import load, parse, parse_csv, to_text
from parallel.schedules.validator import validate

__all__ = [
    "COMPUTING",
    "NAMES",
    "Action",
    "Candidate",
    "Choice",
    "Durations",
    "Kind",
    "Link",
    "Schedule",
    "Timeline",
    "activations",
    "allows",
    "best_schedule",
    "bubble",
    "build",
    "columns",
    "load",
    "parse",
    "parse_csv",
    "peak_activations",
    "simulate",
    "to_text",
    "usual_stages_per_rank",
    "validate",
    "with_communication",
    "without_communication",
]
