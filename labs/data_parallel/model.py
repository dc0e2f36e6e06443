"""The formulas: bytes held and communicated, to the byte; seconds of a step.

    step      = compute + communication - overlap
    compute   = forward + backward + share of the parameters x update, part by part
                (labs/training_seconds.py), + FRESH x activations x page fault
    message   = alpha + bytes x beta, and a collective what its usual algorithm makes of it (ring, pairwise;
                parallel/collective_costs.py), over gloo with hand-overs between threads (labs/gloo_costs.py)
    overlap   = min(2/3 compute, communication that begins before backward ends and needs no core)
    straggler = compute + (E[max over ranks of the sum of H delays] + exchange) / H

alpha and beta are those of send and receive over gloo, and over shm those of copies, not of collectives: a
message is copied in, added and copied out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from labs import gloo_costs, training_seconds
from labs.data_parallel import straggling
from labs.data_parallel.config import Config
from labs.data_parallel.holding import PARTS
from labs.data_parallel.training import OURS
from labs.data_parallel.ways import MEMORY, REPLICAS, step_names
from labs.lab import Prediction
from labs.machine import Machine
from labs.training_seconds import Batch

if TYPE_CHECKING:
    from labs.models.configuration import GPTConfig
    from parallel.memory_held import Memory

FLOAT = 4  # bytes
FRESH = 2  # kept tensors and their gradients are new memory in each step


@cache
def meta(config: GPTConfig) -> Any:
    """The model without memory, to be looked at only."""
    import torch

    from labs.models.gpt import GPT

    with torch.device("meta"):
        return GPT(config)


def units(model: Any) -> list[Any]:
    """What ``fully_shard`` is called on."""
    return [*model.blocks, model]


# --- bytes ---------------------------------------------------------------------------------------


def memory(config: Config, name: str, rank: int = 0) -> Memory:
    """Parameters, gradients and AdamW's state that ``rank`` holds."""
    import torch

    from parallel import data, fsdp, zero
    from parallel.memory_held import Memory

    model = meta(config.gpt())
    params = list(model.parameters())
    if name in ("single", "ddp"):
        whole = data.predict_memory(model)
        moments = sum(2 * FLOAT * p.numel() + FLOAT for p in params)  # and a count of steps
        return Memory(whole.parameters, whole.gradients, moments)
    if name == "fsdp":
        return fsdp.predict_memory(units(model), config.ranks, rank=rank)
    stage = int(name.removeprefix("zero"))
    return zero.predict_memory(params, torch.optim.AdamW, config.ranks, rank, stage)


def held(config: Config, name: str) -> dict[str, int]:
    """Bytes of each of ``PARTS`` on rank 0."""
    from labs.models.formulas import activation_bytes

    found = memory(config, name)
    activations = activation_bytes(config.gpt(), config.sequences, config.length)
    return dict(zip(PARTS, (found.parameters, found.gradients, found.optimizer, activations), strict=True))


def communicated(config: Config, name: str) -> dict[str, int]:
    """Operation -> payload bytes of a step of one rank."""
    from parallel import data, fsdp, zero

    model = meta(config.gpt())
    params = list(model.parameters())
    if name == "fsdp":
        return fsdp.predict_communication(units(model), config.ranks)
    if name == "zero2":
        return zero.predict_communication(params, config.ranks, stage=2)
    if name == "zero1":
        return data.predict_communication(model) | zero.predict_communication(params, config.ranks)
    return data.predict_communication(model)


# --- seconds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Of a step, by part."""

    compute: float
    communication: float = 0.0
    overlap: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.overlap

    def __str__(self) -> str:
        parts = (("compute", self.compute), ("communication", self.communication), ("overlap", self.overlap))
        return ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in parts)


def compute(batch: Batch, machine: Machine, updated: float = 1.0) -> float:
    """Seconds of forward, backward and update; ``updated``: the share of the parameters that are."""
    from labs.models.formulas import activation_bytes

    fault = "page_fault_s_per_byte" if batch.threads == 1 else "page_fault_all_s_per_byte"
    new = FRESH * activation_bytes(batch.gpt, batch.sequences, batch.length)
    faults = new * (machine.get(fault) or 0.0) if machine.allocator == "default" else 0.0
    return training_seconds.step(batch, machine, updated) + faults


def _batch(config: Config, ranks: int) -> Batch:
    return Batch(config.gpt(), config.sequences, config.length, "float32", ranks=ranks)


def collective(
    machine: Machine, backend: str, operation: str, size: float, ranks: int
) -> tuple[float, float]:
    """Seconds of one between processes of this host: what it takes without bytes, and with ``size`` more."""
    from parallel.link import COSTS

    if backend == "gloo":
        latency = gloo_costs.seconds(machine, operation, 0.0, ranks)
        return latency, gloo_costs.seconds(machine, operation, size, ranks) - latency
    copies = 3  # into the segment, added, and out of it: each reads and writes
    beta = 2 * copies / machine.bandwidth(max(size, 1.0))
    cost = COSTS[operation]
    return cost(0, ranks, 2 * machine["torch_call_s"], 0.0), cost(size, ranks, 0.0, beta)


def _calls(config: Config, name: str) -> dict[str, int]:
    """Operation -> number of collectives of a step."""
    from parallel.shards import layout

    strategy = name.removeprefix("torch_")
    if strategy == "fsdp":
        groups = config.layers + 1
        return {"all_gather": 2 * groups, "all_to_all": groups}
    buckets = len(layout(list(meta(config.gpt()).parameters())))
    return dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), buckets)


def step(config: Config, machine: Machine, name: str, backend: str) -> Seconds:
    """Seconds of a step of a rank under the strategy; PyTorch's are ours by another hand."""
    strategy = name.removeprefix("torch_")
    updated = 1.0 if strategy in ("single", "ddp") else 1 / config.ranks
    if strategy == "single":
        return Seconds(compute(_batch(config, 1), machine))
    busy = compute(_batch(config, config.ranks), machine, updated)
    waiting = moving = hidden = 0.0
    calls = _calls(config, name)
    for operation, payload in communicated(config, strategy).items():
        count = calls[operation]
        one = collective(machine, backend, operation, payload / count, config.ranks)
        wait, move = (count * each for each in one)
        early = (count - 1) / count  # the last has nothing left to hide behind
        if strategy == "zero1" and operation == "all_gather":
            early = 0.0  # behind the update
        waiting, moving = waiting + wait, moving + move
        hidden += early * (wait + (move if machine.cores > config.ranks else 0.0))
    return Seconds(busy, waiting + moving, min(hidden, 2 / 3 * busy))


def replicas(config: Config, machine: Machine, name: str) -> Seconds:
    """The whole batch: on one replica with all cores; on replicas in threads; on a process each."""
    from parallel.replicas import predict_communication

    if name == "ddp":
        return step(config, machine, "ddp", "gloo")
    batch = Batch(config.gpt(), config.sequences * config.ranks, config.length, "float32", threads=0)
    whole = compute(batch, machine)
    if name == "one_replica":
        return Seconds(whole)
    # One interpreter makes every replica's calls, and copies the parameters there and the gradients back.
    calls = (config.ranks - 1) * training_seconds.calls(batch, machine)
    copied = 2.0 * sum(predict_communication(meta(batch.gpt), config.ranks).values())
    starts = (config.ranks - 1) * machine["thread_start_s"]
    return Seconds(whole + calls + starts, copied / machine.bandwidth(copied))


def straggler(config: Config, machine: Machine, name: str) -> tuple[float, str]:
    """Expected seconds of a step with ranks that are late, and the formula with its numbers."""
    from labs.models.formulas import parameters
    from parallel.straggler import expected_step_seconds

    gpt, delay = config.small_gpt(), straggling.straggler(config).delay
    size = FLOAT * parameters(gpt)
    exchange = sum(collective(machine, "gloo", "all_reduce", size, config.ranks))
    busy = compute(Batch(gpt, config.sequences, config.length, "float32", ranks=config.ranks), machine)
    every = 1 if name == "synchronous" else config.local_steps
    longest = delay.expected_maximum(config.ranks, every)
    text = (
        f"compute {1e3 * busy:.3g} ms + (E[max over {config.ranks} ranks of {every} delays] "
        f"{1e3 * longest:.3g} ms + exchange {1e3 * exchange:.3g} ms) / {every}"
    )
    return expected_step_seconds(busy, delay, config.ranks, every, exchange), text


# --- stated before anything is measured --------------------------------------------------------------


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    found: list[Prediction] = []
    for name in MEMORY:
        found += _exact(f"memory/{name}", held(config, name), HELD[name].format(p=config.ranks))
    for name in OURS:
        because = f"parallel's predict_communication for {config.ranks} ranks"
        found += _exact(f"bytes/{name}", communicated(config, name), because)
    for variant, name, backend in step_names(config):
        seconds = step(config, machine, name, backend)
        suspect = SUSPECTS["torch" if name.startswith("torch") else name]
        found.append(Prediction(f"step/{variant}", "time_s", seconds.total, str(seconds), suspect))
    for name in REPLICAS:
        seconds = replicas(config, machine, name)
        found.append(
            Prediction(f"replicas/{name}", "time_s", seconds.total, str(seconds), SUSPECTS.get(name, ""))
        )
    for name in straggling.WAYS:
        value, because = straggler(config, machine, name)
        found.append(Prediction(f"straggler/{name}", "step_s", value, because, SUSPECTS["straggler"]))
    return found


def _exact(variant: str, counts: Mapping[str, int], because: str) -> list[Prediction]:
    suspect = "the count: these are equal or one of both is wrong"
    return [
        Prediction(variant, f"{key}_B", value, because, suspect, exact=True) for key, value in counts.items()
    ]


HELD = {
    "single": "everything: parameters 4 B, gradients 4 B, AdamW 8 B each",
    "ddp": "everything, on each of {p} ranks",
    "zero1": "optimizer state 1/{p}",
    "zero2": "optimizer state and gradients 1/{p}",
    "fsdp": "parameters, gradients and optimizer state 1/{p} (rows, padded)",
}
SUSPECTS = {
    "single": "operators on small tensors, which come nowhere near the peak",
    "ddp": "operators on small tensors; hooks; ranks that wait for one another",
    "zero1": "the update in pieces; ranks that wait for one another",
    "zero2": "hooks; ranks that wait for one another",
    "fsdp": "Python of each unit: gathering, registering, freeing",
    "torch": "what the library does for each call, which the formula leaves out",
    "one_replica": "regions too small for all cores",
    "data_parallel": "the interpreter's lock, handed over for every operator",
    "straggler": "the draws (fixed by a seed) against their expectation; operators on small tensors",
}


def memory_bytes(config: Config) -> float:
    """Every variant of the group ``step`` is alive at once, on every rank."""
    from labs.models.formulas import activation_bytes, parameters

    ways = len(step_names(config))
    model = 24.0 * parameters(config.gpt())
    activations = activation_bytes(config.gpt(), config.sequences, config.length)
    return config.ranks * (ways * model + 3.0 * activations + 5e8)
