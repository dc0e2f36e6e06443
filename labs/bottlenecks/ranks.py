"""Faults of a job on several ranks, each with its fix. Over gloo: a report shows its collectives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from labs.bottlenecks.job import Job

if TYPE_CHECKING:
    import torch


def shares(sequences: int, ranks: int, uneven: int = 1) -> list[int]:
    """Sequences of each rank: the last has ``uneven`` times as many as another, as nearly as whole sequences
    allow. ValueError: not every rank would have one."""
    if sequences < ranks:
        raise ValueError(f"{sequences} sequences are too few for {ranks} ranks")
    if uneven == 1:
        return [(sequences + rank) // ranks for rank in range(ranks)]
    each = max(1, min(round(sequences / (ranks - 1 + uneven)), (sequences - 1) // ranks))
    return [each] * (ranks - 1) + [sequences - each * (ranks - 1)]


def _share(job: Job, uneven: int = 1) -> None:
    """This rank's part of each batch. Its loss counts by its share of the tokens, times the ranks, because
    gradients are averaged over ranks."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    counts = shares(job.config.sequences, ranks, uneven)
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    job.batches = [(tokens[rows], targets[rows]) for tokens, targets in job.batches]
    plain, job.ranks = job.loss_of, ranks
    job.loss_of = lambda logits, targets: ranks * plain(logits, targets)


def _data_parallel(job: Job) -> Any:
    import torch
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")
    job.closing.append(lambda: dist.destroy_process_group(group))
    job.forward = torch.nn.parallel.DistributedDataParallel(
        job.model, process_group=group, gradient_as_bucket_view=True
    )
    return job.forward


def _one_by_one(tokens: torch.Tensor, targets: torch.Tensor) -> Any:
    return zip(tokens.split(1), targets.split(1), strict=True)


def eager_exchange(job: Job) -> None:
    """Gradients accumulate over single sequences, and after each every parameter's is exchanged by itself
    while all wait."""
    import torch.distributed as dist

    _share(job)
    job.split = _one_by_one
    group = dist.new_group(backend="gloo")
    job.closing.append(lambda: dist.destroy_process_group(group))

    def exchange() -> None:
        for parameter in job.model.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM, group)
            parameter.grad /= dist.get_world_size()

    job.piece_done = exchange


def late_exchange(job: Job) -> None:
    """The same gradients exchanged once, in buckets, while the last backward still runs."""
    _share(job)
    job.split = _one_by_one
    wrapped = _data_parallel(job)
    job.piece = lambda last: nullcontext() if last else wrapped.no_sync()


def uneven_shares(job: Job) -> None:
    """The last rank has more to do."""
    _share(job, job.config.uneven)
    _data_parallel(job)


def even_shares(job: Job) -> None:
    _share(job)
    _data_parallel(job)
