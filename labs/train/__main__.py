"""``torchrun --nproc-per-node 2 -m labs.train --strategy fsdp``: a line a step on rank 0."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from labs.train.options import Options


def main() -> int:
    from labs.train.options import parse

    options = parse()
    import torch

    from labs.train.world import joined
    from parallel.elastic import RankLost

    if options.backend == "nccl" and not torch.cuda.is_available():
        print(
            "labs.train: --backend nccl needs CUDA devices, and torch finds none; use gloo or shm",
            file=sys.stderr,
        )
        return 2
    there_are_others = False
    try:
        with joined(options) as device:
            there_are_others = True
            run(options, device)
    except (RankLost, TimeoutError, ValueError) as error:
        # The other ranks are told of it by leaving ``joined``. What is wrong for all of them each finds by
        # itself, and whoever says so first is lost to the rest: theirs is the cause, and rank 0 prints it.
        cause = error.__cause__
        own = cause if isinstance(error, RankLost) and isinstance(cause, ValueError) else error
        wrong = isinstance(own, ValueError)
        if not (wrong and there_are_others) or os.environ.get("RANK", "0") == "0":
            print(f"labs.train: {own}", file=sys.stderr)
        return 2 if wrong else 1
    return 0


def run(options: Options, device: torch.device) -> None:
    """Train, with a line a step on rank 0. ValueError for what does not fit the ranks or the checkpoint."""
    import torch.distributed as dist

    from labs.train.loop import resume, train
    from labs.train.strategies import build

    trainer = build(options, device)
    done = resume(options, trainer)
    if done and dist.get_rank() == 0:
        print(f"resumed after step {done} from {options.checkpoint}", flush=True)
    for report in train(options, trainer, device, done):
        if dist.get_rank() == 0:
            print(report.line(options.steps), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
