"""What the simulator says of a schedule, for given stage times and the costs of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labs.machine import Machine

if TYPE_CHECKING:
    from labs.pipeline.config import Config
    from parallel.schedules import Durations, Link, Schedule, Timeline

ACTION_CALLS = 20  # Python of the runtime for an action, in calls of an operator
MESSAGE_CALLS = 60  # and at either end of a message, with gloo's part of it
FLOAT = 4  # bytes


def overhead(machine: Machine) -> float:
    """Seconds of the runtime before each action."""
    return ACTION_CALLS * machine["torch_call_s"]


def link(machine: Machine, activation_bytes: float) -> Link:
    """Messages between processes of this host, over gloo."""
    from parallel.schedules import Link

    return Link(
        machine["gloo_message_s"],
        machine["gloo_s_per_byte"],
        activation_bytes,
        MESSAGE_CALLS * machine["torch_call_s"],
    )


def meetings(machine: Machine, ranks: int) -> float:
    """Seconds of the two small all-gathers of a step, at its start and its end (round the ring)."""
    return 2 * (ranks - 1) * machine["gloo_message_s"]


def timeline(machine: Machine, schedule: Schedule, durations: Durations, activation_bytes: float) -> Timeline:
    """When each action happens."""
    from parallel.schedules import simulate

    return simulate(schedule, durations, link(machine, activation_bytes), overhead(machine))


def step_seconds(
    machine: Machine, schedule: Schedule, durations: Durations, activation_bytes: float
) -> float:
    """Seconds of a step as it is timed, with what stands around the schedule."""
    step = timeline(machine, schedule, durations, activation_bytes).step
    return step + meetings(machine, schedule.world_size)


def virtual_unit(config: Config, schedule: Schedule) -> float:
    """Seconds of a virtual stage's forward: the rank's share, divided among its stages."""
    return config.unit_ms / 1e3 * schedule.world_size / schedule.stages


def virtual_durations(config: Config, schedule: Schedule) -> Durations:
    """Of virtual devices, whose gradients take as long as the forward."""
    from parallel.schedules import Durations

    unit = virtual_unit(config, schedule)
    return Durations(unit, unit, unit)


def state_bytes(config: Config, model: str) -> float:
    """Bytes that go from a stage to the next for a micro-batch: states, and in the encoder-decoder the memory
    beside them in its second half (counted everywhere; tokens are few)."""
    states = FLOAT * config.sequences * config.length * config.width
    return states * (2 if model == "encoder_decoder" else 1)
