"""``torchrun --nproc-per-node 2 -m labs.train --strategy fsdp``: a line a step on rank 0."""

from __future__ import annotations

import sys


def main() -> int:
    from labs.train.options import parse

    options = parse()
    import torch
    import torch.distributed as dist

    from labs.train.loop import resume, train
    from labs.train.strategies import build
    from labs.train.world import joined

    if options.backend == "nccl" and not torch.cuda.is_available():
        print(
            "labs.train: --backend nccl needs CUDA devices, and torch finds none; use gloo or shm",
            file=sys.stderr,
        )
        return 2
    with joined(options) as device:
        try:
            trainer = build(options, device)
            done = resume(options, trainer)
            if done and dist.get_rank() == 0:
                print(f"resumed after step {done} from {options.checkpoint}", flush=True)
            for report in train(options, trainer, device, done):
                if dist.get_rank() == 0:
                    print(report.line(options.steps), flush=True)
        except ValueError as error:
            if dist.get_rank() == 0:
                print(f"labs.train: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
