"""Faults of one process, each with its fix: functions that change a healthy job."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from labs.bottlenecks import allocator, unfused
from labs.bottlenecks.job import Job
from labs.bottlenecks.restored import Restored
from labs.machine import usable_cores

if TYPE_CHECKING:
    import torch

DEEPER = 2
"""Times as many blocks has the model whose activations fill the memory."""

NARROWER = 4
"""Times as narrow is the model of tiny batches."""

MEMORY_LIMIT = Restored(
    lambda: resource.getrlimit(resource.RLIMIT_RSS),
    lambda pair: resource.setrlimit(resource.RLIMIT_RSS, pair),
)
"""What the process is said to have of memory. Linux reports this limit and does not enforce it."""

Plant = Callable[[Job], None]


# --- input: a sequence takes a while to arrive ------------------------------------------------------


class Remote:
    """Sequences in a storage that answers after ``seconds``: a dataset for ``DataLoader``."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.pairs = [pair for tokens, targets in job.batches for pair in zip(tokens, targets, strict=True)]
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> Any:
        time.sleep(self.seconds)
        return self.pairs[place]


def slow_input(job: Job) -> None:
    """The loop reads a batch, sequence by sequence, when it needs it."""
    from torch.utils.data import DataLoader

    dataset: Any = Remote(job, job.config.read_ms / 1e3)
    loader = DataLoader(dataset, job.config.sequences)
    reading = iter(loader)

    def following() -> Any:
        nonlocal reading
        try:
            return next(reading)
        except StopIteration:
            reading = iter(loader)
            return next(reading)

    job.next_batch = following


def prefetched_input(job: Job) -> None:
    """Threads read the sequences of the next batch while this one is computed, all at once."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    remote = Remote(job, job.config.read_ms / 1e3)
    readers = ThreadPoolExecutor(job.config.sequences)
    place = 0

    def ask() -> list[Any]:
        nonlocal place
        wanted = [(place + number) % len(remote) for number in range(job.config.sequences)]
        place = (place + job.config.sequences) % len(remote)
        return [readers.submit(remote.__getitem__, number) for number in wanted]

    coming = ask()

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal coming
        pairs = [future.result() for future in coming]
        coming = ask()
        tokens, targets = zip(*pairs, strict=True)
        return torch.stack(tokens), torch.stack(targets)

    job.next_batch = next_batch
    job.closing.append(readers.shutdown)


# --- python: a figure for the log, computed number by number ------------------------------------------


def python_entropy(job: Job) -> None:
    """The mean entropy of the predictions in a Python loop over all probabilities."""

    def entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
        total = 0.0
        for _ in range(job.config.python_passes):
            for row in logits.flatten(0, -2).softmax(-1).tolist():
                for probability in row:
                    if probability > 0.0:
                        total -= probability * math.log(probability)
        return total / (job.config.python_passes * targets.numel())

    job.watch = entropy


def tensor_entropy(job: Job) -> None:
    """The same in two operations on tensors."""
    import torch

    def entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
        probabilities = logits.flatten(0, -2).softmax(-1)
        return float(torch.special.entr(probabilities).sum() / targets.numel())

    job.watch = entropy


# --- dispatch, precision, threads, allocator --------------------------------------------------------------


def healthy(job: Job) -> None:
    """Nothing planted."""


def narrow(job: Job) -> None:
    """A model of a quarter of the width: little work in each operator."""
    job.build(replace(job.config, width=job.config.width // NARROWER))


def tiny_batches(job: Job) -> None:
    """The gradient of a narrow model's batch piece by piece, each a few tokens."""
    narrow(job)
    length = job.config.piece_length

    def split(tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        return zip(tokens.reshape(-1, length).split(1), targets.reshape(-1, length).split(1), strict=True)

    job.split = split


def short_sequences(job: Job) -> None:
    """The same pieces, all at once: what a token sees is unchanged."""
    narrow(job)
    length = job.config.piece_length
    job.batches = [
        (tokens.reshape(-1, length), targets.reshape(-1, length)) for tokens, targets in job.batches
    ]


def float32_products(job: Job) -> None:
    job.precision = "float32"


def many_threads(job: Job) -> None:
    """Several for each core, as libraries set that count a host's cores and not a container's."""
    job.threads = usable_cores() * job.config.threads


def free_cores() -> int:
    """All but one, which is left to loaders, profilers and the system."""
    return max(1, usable_cores() - 1)


def a_thread_a_free_core(job: Job) -> None:
    """Where a core is taken, threads that spin for it cost more than it would bring."""
    job.threads = free_cores()


def returned_memory(job: Job) -> None:
    """Memory is given back after each half of a block, forward and backward, as code does that fears for
    it."""
    for block in job.model.blocks:
        for half in (block.attention, block.feed_forward):
            half.register_forward_hook(lambda *call: allocator.give_back())
            half.register_full_backward_hook(lambda *call: allocator.give_back())


# --- memory ------------------------------------------------------------------------------------------------


def unfused_operations(job: Job) -> None:
    """Norms, activations, loss and update written out, operation by operation."""
    import torch

    unfused.use(job.model)
    job.loss_of = unfused.cross_entropy
    job.optimizer = torch.optim.AdamW(job.model.parameters(), job.optimizer.defaults["lr"], foreach=False)


def kept_activations(job: Job) -> None:
    """A deeper model, whose activations leave little of the memory that there is."""
    deeper(job)
    MEMORY_LIMIT.enter()
    job.closing.append(MEMORY_LIMIT.leave)
    job.ready = lambda: _limit_memory(job)


def recomputed_activations(job: Job) -> None:
    """The same, with each block's activations computed again in backward instead of kept."""
    from torch.utils.checkpoint import checkpoint

    kept_activations(job)
    for block in job.model.blocks:
        forward = block.forward

        def again(*given: Any, forward: Any = forward, **named: Any) -> Any:
            return checkpoint(forward, *given, use_reentrant=False, **named)

        block.forward = again


def deeper(job: Job) -> None:
    """A healthy model of more blocks."""
    job.build(replace(job.config, layers=DEEPER * job.config.layers))


def _limit_memory(job: Job) -> None:
    """A limit that leaves room for the kept activations and little else. Stated before each step: what other
    jobs of the process, its profiler or its allocator have taken since the last one is none of this job's."""
    from labs import memory
    from labs.bottlenecks.model import step_bytes

    room = int(job.config.spare * step_bytes(job.config))
    hard = resource.getrlimit(resource.RLIMIT_RSS)[1]
    resource.setrlimit(resource.RLIMIT_RSS, (memory.in_use_bytes() + room, hard))
