"""The formulas: steps that each search trains, exactly, and seconds, before anything is measured.

step       = compute of the GPT (labs/data_parallel/model.py: FLOPs, bytes, calls)
loss       = a third of a step of the validation batch: forward only
search     = the scheduler itself on a simulated clock: job + steps x step + milestones x loss
Ray Tune   = its own start + rounds x (process and imports + whole training), a trial a worker in each
together   = K turns of a step in torch; in JAX the same FLOPs and bytes, with a step's thunks once
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from labs.data_parallel.model import BLOCK_CALLS, OTHER_CALLS, compute
from labs.lab import Prediction
from labs.machine import Machine
from labs.tuning.config import METHODS, Config
from labs.tuning.running import Trace, search
from labs.tuning.schedulers import RandomSearch, Scheduler
from labs.tuning.simulated import SimulatedWorkers
from labs.tuning.training import VALIDATION_SEQUENCES, Task
from labs.tuning.ways import FIDELITIES, FIDELITY, SEARCH, START, TOGETHER, TOGETHER_STEPS, cheaper

EXACT = ("random", "successive_halving", "hyperband", "population")
"""Methods whose number of steps follows from their sizes; the others' from losses too."""
RAY_HANDS = 60
"""Hand-overs between processes in a call of a Ray actor that is waited for, as ``process_switch_s``: through
two core workers, the scheduler's socket and an event loop at each end."""
BUILD_STEPS = 8
"""A job makes a model and an optimizer, unpacks and packs some fifty tensors: as long as so many steps."""
MAKE_STEPS = 2
"""Parameters made and stacked for JAX, in the same unit."""
TORCH_SPAWNS = 100
"""A trial's process imports Ray, Tune and torch: as long as so many starts of a bare interpreter."""
TUNE_SPAWNS = 30
"""Ray Tune's own start in the driver, imports and the folders of an experiment, in the same unit."""
NOISE_NATS = 0.05
"""Between the losses of one trial a few steps apart."""
SMALL = 4
"""By so much XLA's loops and batched products on arrays as small as these miss peak and bandwidth."""
THUNKS_OF_BLOCK, OTHER_THUNKS = 60, 90
"""Compiled pieces of a step that XLA runs one after another; each costs about a call of torch."""


def step_s(task: Task, machine: Machine) -> float:
    """Seconds of a training step on one thread."""
    return _compute(task, machine, task.sequences) + _calls(task, machine)


def _compute(task: Task, machine: Machine, sequences: int) -> float:
    """Without page faults: the allocator keeps blocks as small as these for the next step."""
    return compute(task.gpt(), machine.with_allocator("tuned"), sequences, task.length)


def _calls(task: Task, machine: Machine) -> float:
    """What autograd adds to a step's operators: each is recorded, and its node run, for about the price of
    the operator itself, which is nearly all that it costs on tensors as small as these."""
    return (BLOCK_CALLS * task.layers + OTHER_CALLS) * machine["torch_call_s"]


def loss_s(task: Task, machine: Machine) -> float:
    """Seconds of a validation loss."""
    return (_compute(task, machine, VALIDATION_SEQUENCES) + _calls(task, machine)) / 3


def training_s(task: Task, machine: Machine, start: int, stop: int) -> float:
    """Seconds from ``start`` to ``stop`` steps, losses at milestones among them."""
    losses = sum(start < step <= stop for step in task.milestones)
    return (stop - start) * step_s(task, machine) + losses * loss_s(task, machine)


def job_s(task: Task, machine: Machine) -> float:
    """Seconds of a job besides its training."""
    return RAY_HANDS * machine["process_switch_s"] + BUILD_STEPS * step_s(task, machine)


def curves(config: Config) -> list[dict[int, float]]:
    """Losses that a search might meet, where nothing is known: ends and powers at random, and batches that
    differ. Only searches whose length depends on losses care."""
    generator = random.Random(config.seed)
    found = []
    for _ in range(config.configurations):
        end, power = generator.uniform(2.4, 3.4), generator.uniform(0.3, 0.8)
        found.append(
            {
                step: end + 3.0 * step**-power + generator.gauss(0.0, NOISE_NATS)
                for step in config.milestones()
            }
        )
    return found


def simulate(config: Config, scheduler: Scheduler, task: Task, machine: Machine) -> Trace:
    """The scheduler on workers as fast as predicted."""
    per_step = training_s(task, machine, 0, config.most_steps) / config.most_steps
    workers = SimulatedWorkers(config.workers, curves(config), per_step, job_s(task, machine))
    return search(scheduler, workers)


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    found: list[Prediction] = []
    task = config.task()
    step = step_s(task, machine)
    for name in METHODS:
        trace = simulate(config, config.scheduler(name), task, machine)
        if name in EXACT:
            because = f"{len(trace.ended)} jobs, which follow from the sizes alone"
            suspect = "the scheduler: these are equal or one of both is wrong"
            found.append(Prediction(f"{SEARCH}/{name}", "steps", trace.steps, because, suspect, exact=True))
        because = (
            f"{trace.steps} steps of {1e3 * step:.3g} ms in {len(trace.ended)} jobs of "
            f"{1e3 * job_s(task, machine):.3g} ms besides, on {config.workers} workers, simulated"
        )
        suspect = (
            "operators on small tensors, whose calls are longer than torch.neg's; workers on shared cores"
        )
        found.append(Prediction(f"{SEARCH}/{name}", "time_s", trace.seconds, because, suspect))
    for name in FIDELITIES:
        points, other = config.points(), cheaper(config, name)
        trace = simulate(config, RandomSearch(points, config.most_steps), other, machine)
        because = f"{trace.steps} steps of {1e3 * step_s(other, machine):.3g} ms on {config.workers} workers"
        found.append(Prediction(f"{FIDELITY}/{name}", "time_s", trace.seconds, because, "as for search"))
    found += _start(config, machine)
    found += _together(config, machine)
    return found


def _start(config: Config, machine: Machine) -> list[Prediction]:
    task, trials = config.task(), config.peer_trials
    whole = training_s(task, machine, 0, config.most_steps) + job_s(task, machine)
    process, own = (spawns * machine["spawn_s"] for spawns in (TORCH_SPAWNS, TUNE_SPAWNS))
    rounds = -(-trials // config.workers)
    found = []
    for name, processes in (("ray_tune", rounds), ("ray_tune_reused", 1), ("warm_workers", 0)):
        because = (
            f"{rounds} rounds of {whole:.3g} s and {processes} starts of {process:.3g} s, one after another"
        )
        because += f", after Tune's own of {own:.3g} s" if processes else ""
        imports = "importing torch and Ray, which no constant of the machine measures"
        suspect = imports if processes else "operators on small tensors"
        seconds = rounds * whole + processes * process + (own if processes else 0.0)
        found.append(Prediction(f"{START}/{name}", "time_s", seconds, because, suspect))
    return found


def _together(config: Config, machine: Machine) -> list[Prediction]:
    """Steps and a loss; on all cores."""
    task, count = replace(config.task(), milestones=()), config.together
    torch_s = count * ((TOGETHER_STEPS + 1) * step_s(task, machine) + loss_s(task, machine))
    call = machine["torch_call_s"]
    thunks = THUNKS_OF_BLOCK * task.layers + OTHER_THUNKS
    calls = thunks * call + machine["jax_call_s"]
    found = [
        Prediction(
            f"{TOGETHER}/torch_in_turn",
            "time_s",
            torch_s,
            f"{count} trials of {TOGETHER_STEPS} steps of {1e3 * step_s(task, machine):.3g} ms",
            "operators on small tensors",
        )
    ]
    work = SMALL * (_compute(task, machine, task.sequences) - _calls(task, machine))
    for name, turns in (("jax_in_turn", count), ("jax_vmap", 1)):
        making = turns * MAKE_STEPS * step_s(task, machine)
        seconds = (TOGETHER_STEPS + 1) * (turns * calls + count * work) + making
        because = (
            f"{TOGETHER_STEPS} steps and a loss of {turns} x {1e3 * calls:.3g} ms of thunks and {count} x "
            f"{1e3 * work:.3g} ms of arithmetic and memory, and {1e3 * making:.3g} ms to make them"
        )
        suspect = "XLA's loops for small batched products and for the embedding's gradient"
        found.append(Prediction(f"{TOGETHER}/{name}", "time_s", seconds, because, suspect))
    return found


def memory_bytes(config: Config) -> float:
    """Workers with torch, Ray's own processes and its object store."""
    return (config.workers + 4) * 4e8 + 3e8
