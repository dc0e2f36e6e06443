"""The formulas: steps that each search trains, exactly, and seconds, before anything is measured.

steps      = n R for random search; sum over rungs of n_k (r_k - r_k-1) with n_k+1 = floor(n_k / eta) for
             halving, and over its brackets for Hyperband; members R for population based training
step       = forward, backward and update of the GPT (labs/training_seconds.py)
loss       = forward of the validation batch
search     = the scheduler itself on a simulated clock: job + steps x step + milestones x loss
Ray Tune   = its own start + rounds x (process and imports + whole training), a trial a worker in each; its
             search, whose processes are used again: both starts once, the reports and our search
together   = K turns of a step in torch, or K / workers; in JAX the same FLOPs and bytes, a step's thunks once
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from labs import training_seconds
from labs.lab import Prediction
from labs.machine import Machine
from labs.training_seconds import Batch
from labs.tuning.config import METHODS, Config
from labs.tuning.running import Trace, search
from labs.tuning.schedulers import RandomSearch, Scheduler
from labs.tuning.simulated import SimulatedWorkers
from labs.tuning.training import VALIDATION_SEQUENCES, Task
from labs.tuning.ways import FIDELITIES, FIDELITY, PEER, SEARCH, START, TOGETHER, TOGETHER_STEPS, cheaper

EXACT = ("random", "successive_halving", "hyperband", "population")
"""Methods whose number of steps follows from their sizes; the others' from losses too."""
# What follows has no source but runs of this lab on one machine. Where it is most of a time, that is not
# counted among the predicted ones (``Prediction.fitted``); of most searches' it is a tenth.
RAY_HANDS = 60
"""Hand-overs between processes in a call of a Ray actor that is waited for, as ``process_switch_s``: through
two core workers, the scheduler's socket and an event loop at each end."""
BUILD_STEPS = 4
"""A job makes a model and an optimizer, unpacks and packs some fifty tensors: as long as so many steps."""
TORCH_SPAWNS = 100
"""A trial's process imports Ray, Tune and torch: as long as so many starts of a bare interpreter."""
TUNE_SPAWNS = 30
"""Ray Tune's own start in the driver and the folders of an experiment, in the same unit."""
REPORT_SPAWNS = 1
"""A report to Ray Tune and its scheduler's answer, in the same unit."""
SMALL = 2.5
"""By so much XLA's loops and batched products on arrays as small as these miss torch's."""
THUNKS_OF_BLOCK, OTHER_THUNKS = 60, 90
"""Compiled pieces of a step that XLA runs one after another; each costs about a call of torch."""

TRAINED_BYTES = 16
"""A parameter, its gradient and AdamW's two moments in float32; JAX's step has old and new ones at once."""
NOISE_NATS = 0.05
"""Between the losses of one trial a few steps apart."""


def halving_steps(count: int, rungs: Sequence[int], eta: int) -> int:
    """Of ``count`` trials, the best 1/eta of which go on from each rung, at least one."""
    total, before = 0, 0
    for rung in rungs:
        total += count * (rung - before)
        count, before = max(1, count // eta), rung
    return total


def exact_steps(config: Config, name: str) -> int:
    """Training steps of one of ``EXACT``, from the sizes alone: no scheduler is asked.

    Hyperband's brackets have ceil((s_max + 1) / (s + 1) eta^s) trials in the paper, and here the same shares
    of the configurations.
    """
    count, most, eta, rungs = config.configurations, config.most_steps, config.eta, config.rungs()
    if name == "random":
        return count * most
    if name == "population":
        return config.population * most
    if name == "successive_halving":
        return halving_steps(count, rungs, eta)
    largest = len(rungs) - 1
    sizes = [math.ceil((largest + 1) * eta**s / (s + 1)) for s in range(largest, -1, -1)]
    ends = [round(count * sum(sizes[: place + 1]) / sum(sizes)) for place in range(len(sizes))]
    return sum(
        halving_steps(end - begin, rungs[place:], eta) if end > begin else 0
        for place, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def step_s(task: Task, machine: Machine) -> float:
    """Seconds of a training step on one thread. No page faults: the allocator keeps blocks as small as these
    for the next step."""
    return training_seconds.step(_batch(task, task.sequences), machine)


def _batch(task: Task, sequences: int) -> Batch:
    return Batch(task.gpt(), sequences, task.length, "float32")


def loss_s(task: Task, machine: Machine) -> float:
    """Seconds of a validation loss."""
    return training_seconds.forward(_batch(task, VALIDATION_SEQUENCES), machine).total


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
    for _ in range(max(config.configurations, config.population)):
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
            because = "trials of each rung times the steps to it, from the sizes alone"
            suspect = "the scheduler: these are equal or one of both is wrong"
            steps = exact_steps(config, name)
            found.append(Prediction(f"{SEARCH}/{name}", "steps", steps, because, suspect, exact=True))
        because = (
            f"{trace.steps} steps of {1e3 * step:.3g} ms in {len(trace.ended)} jobs of "
            f"{1e3 * job_s(task, machine):.3g} ms besides, on {config.workers} workers, simulated"
        )
        suspect = (
            "operators on small tensors, whose calls are longer than those on one number; workers on shared "
            "cores"
        )
        found.append(Prediction(f"{SEARCH}/{name}", "time_s", trace.seconds, because, suspect))
    found.append(_peer(config, machine))
    for name in FIDELITIES:
        points, other = config.points(), cheaper(config, name)
        trace = simulate(config, RandomSearch(points, config.most_steps), other, machine)
        because = f"{trace.steps} steps of {1e3 * step_s(other, machine):.3g} ms on {config.workers} workers"
        found.append(Prediction(f"{FIDELITY}/{name}", "time_s", trace.seconds, because, "as for search"))
    found += _start(config, machine)
    found += _together(config, machine)
    return found


def _peer(config: Config, machine: Machine) -> Prediction:
    """Ray Tune's asynchronous halving: its starts, and as many steps as ours on as many workers."""
    trace = simulate(config, config.scheduler("asha"), config.task(), machine)
    start = (TORCH_SPAWNS + TUNE_SPAWNS) * machine["spawn_s"]
    reports = len(trace.ended) * REPORT_SPAWNS * machine["spawn_s"]
    because = (
        f"starts of Tune and its processes of {start:.3g} s, {len(trace.ended)} reports in {reports:.3g} s "
        f"and {trace.steps} steps in {trace.seconds:.3g} s; start and reports are fitted"
    )
    suspect = "who is stopped, which depends on who comes first"
    seconds = start + reports + trace.seconds
    return Prediction(f"{SEARCH}/{PEER}", "time_s", seconds, because, suspect, fitted=True)


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
        because += "; both starts are fitted" if processes else ""
        seconds = rounds * whole + processes * process + (own if processes else 0.0)
        address = f"{START}/{name}"
        found.append(Prediction(address, "time_s", seconds, because, suspect, fitted=bool(processes)))
    return found


def _together(config: Config, machine: Machine) -> list[Prediction]:
    """Steps and a loss; in JAX on all cores."""
    task, count = replace(config.task(), milestones=()), config.together
    trial = TOGETHER_STEPS * step_s(task, machine) + loss_s(task, machine)
    said = f"trials of {TOGETHER_STEPS} steps of {1e3 * step_s(task, machine):.3g} ms and a loss"
    most = math.ceil(count / config.workers)
    hands = RAY_HANDS * machine["process_switch_s"]
    suspect = "operators on small tensors"
    found = [
        Prediction(f"{TOGETHER}/torch_in_turn", "time_s", count * trial, f"{count} {said}", suspect),
        Prediction(
            f"{TOGETHER}/torch_at_once",
            "time_s",
            most * trial + hands,
            f"{most} {said} on the worker that has most, and a call of {1e3 * hands:.3g} ms",
            f"{suspect}; workers on shared cores",
        ),
    ]
    call = machine["torch_call_s"]
    thunks = THUNKS_OF_BLOCK * task.layers + OTHER_THUNKS
    calls = thunks * call + machine["jax_call_s"]
    batch = _batch(task, task.sequences)
    passes = (training_seconds.forward(batch, machine), training_seconds.backward(batch, machine))
    work = SMALL * (sum(each.total - each.calls for each in passes) + training_seconds.update(batch, machine))
    for name, turns in (("jax_in_turn", count), ("jax_vmap", 1)):
        seconds = (TOGETHER_STEPS + 1) * (turns * calls + count * work)
        because = (
            f"{TOGETHER_STEPS} steps and a loss of {turns} x {1e3 * calls:.3g} ms of thunks and {count} x "
            f"{1e3 * work:.3g} ms of arithmetic and memory; how many thunks and how slow is fitted"
        )
        suspect = "XLA's loops for small batched products and for the embedding's gradient"
        found.append(Prediction(f"{TOGETHER}/{name}", "time_s", seconds, because, suspect, fitted=True))
    return found


def memory_bytes(config: Config) -> float:
    """Workers with torch, Ray's own processes and its object store; a trial and its activations on each
    worker, and those of one step in JAX."""
    from labs.models.formulas import activation_bytes, parameters

    gpt = config.task().gpt()
    trial = TRAINED_BYTES * parameters(gpt)
    batches = max(config.sequences, VALIDATION_SEQUENCES)
    step = activation_bytes(gpt, batches, config.length)
    own = (config.workers + 4) * 4e8 + 3e8
    return own + config.workers * (trial + step) + config.together * (2 * trial + step)
