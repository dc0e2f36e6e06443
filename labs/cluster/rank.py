"""What runs in each rank that Ray Train has started, and the actor that its reports go to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labs.train.loop import StepReport


@dataclass(frozen=True)
class Joined:
    """A rank, the node that it is on, and after which step it began: 0, or a checkpoint's."""

    rank: int
    node: str
    done: int


class Reports:
    """An actor on the driver's node: what rank 0 says of its steps, and where all ranks are."""

    def __init__(self) -> None:
        self.found: list[Joined | StepReport] = []
        self.begun: set[int] = set()

    def begin(self, rank: int) -> bool:
        """Whether this rank has begun before: it was started again after a loss."""
        again = rank in self.begun
        self.begun.add(rank)
        return again

    def add(self, report: Joined | StepReport) -> None:
        self.found.append(report)

    def since(self, seen: int) -> list[Joined | StepReport]:
        """All but the first ``seen``."""
        return self.found[seen:]


def train_rank(config: dict[str, Any]) -> None:
    """``options``: the Options' fields. ``reports``: the actor. Raises ValueError for what does not fit.

    It goes on from a checkpoint where that was asked for, and where it is started again: ``launch.fit`` has
    seen to it that all checkpoints there are of this run.
    """
    import ray
    import torch.distributed as dist

    from labs.train.loop import resume, train
    from labs.train.options import Options
    from labs.train.strategies import build
    from labs.train.world import joined

    options, reports = Options(**config["options"]), config["reports"]
    with joined(options) as device:
        trainer = build(options, device)
        again = ray.get(reports.begin.remote(dist.get_rank()))
        done = resume(replace(options, resume=options.resume or again), trainer) if options.checkpoint else 0
        node = ray.get_runtime_context().get_node_id()
        ray.get(reports.add.remote(Joined(dist.get_rank(), node, done)))
        for report in train(options, trainer, device, done):
            if dist.get_rank() == 0:
                ray.get(reports.add.remote(report))
