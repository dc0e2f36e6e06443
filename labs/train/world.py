"""The ranks of a training run find each other, whoever started them: torchrun, or Ray on a cluster."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from labs.train.options import Options
from parallel import elastic, link


@contextmanager
def joined(options: Options) -> Iterator[torch.device]:
    """Initialises torch.distributed over the backend asked for; yields the device of this rank.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT stand in the environment. Errors: ``parallel.elastic.join``.
    """
    if options.backend == "shm":
        importlib.import_module("parallel.shm")
    cuda = options.backend == "nccl"
    with elastic.join(link.wrap(options.backend), options.timeout, options.join_timeout) as world:
        device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        yield device
