"""What ``test_parallel.py`` times on every rank of a world, as functions of this module that make a step:

    all_reduce_<backend>_<bytes>             dist.all_reduce of a plain float32 tensor
    exchange_<bytes>                         what an all_reduce over shm does when Python has got there
    cpu_<backend>_<bytes>                    CPU seconds of all ranks for COPIES of them (returned, not timed)
    train_<ours|torch>_<strategy>_<backend>  a step of the GPT at TOKENS tokens a rank

A world's default group is gloo's; the other groups are made once and kept, as a program would.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from labs.models.configuration import GPTConfig

BACKENDS = ("gloo", "shm")
SIZES = tuple(1 << power for power in (10, 12, 16, 18, 20, 22, 24, 26))
EXCHANGED = 1 << 12
COPIES = 20
STRATEGIES = ("ddp", "zero1", "fsdp")
TOKENS, LENGTH = 256, 128
MODEL = GPTConfig(width=128, layers=4, heads=4, context=LENGTH)

Step = Callable[[], object]


@cache
def group_of(backend: str) -> Any:
    import torch.distributed as dist

    if backend == "gloo":
        return dist.group.WORLD
    import parallel.shm  # noqa: F401 (registers the backend)

    return dist.new_group(backend=backend)


def all_reduce(backend: str, size: int) -> Step:
    """Sums of sums overflow to infinity after some hundred calls, which no adder minds."""
    import torch
    import torch.distributed as dist

    group, tensor = group_of(backend), torch.rand(size // 4)
    return lambda: dist.all_reduce(tensor, group=group)


def exchange(size: int) -> Step:
    """The exchange alone, without torch.distributed's way to it: as ``ShmGroup.allreduce`` describes it."""
    import torch
    import torch.distributed as dist

    from parallel.shm_exchange import RUNNING, STALLED

    group, tensor = group_of("shm"), torch.rand(size // 4)
    dist.all_reduce(tensor, group=group)  # it compiles the reduction, and keeps it
    itemsize, reduce, signature = group._sums[tensor.dtype]
    count, address, lane, run = tensor.numel(), tensor.data_ptr(), group._lane, group._run

    def step() -> object:
        lane.describe_all_reduce(signature, count, address, count * itemsize, reduce)
        while run(lane.address) in (STALLED, RUNNING):
            pass
        lane.before += lane.rounds
        return tensor

    return step


def cpu(backend: str, size: int) -> Step:
    step = all_reduce(backend, size)
    for _ in range(3):
        step()

    def measured() -> object:
        import torch
        import torch.distributed as dist

        dist.barrier()
        start = time.process_time()
        for _ in range(COPIES):
            step()
        seconds = torch.tensor([time.process_time() - start], dtype=torch.float64)
        dist.all_reduce(seconds)
        return seconds

    return measured


def train(side: str, strategy: str, backend: str) -> Step:
    """A step of AdamW on the GPT: forward, backward, update; the batch is the same at each step."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from labs.models.gpt import GPT

    torch.manual_seed(0)
    group, model = group_of(backend), GPT(MODEL)
    forward, optimizer = BUILDERS[side, strategy](model, group)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (TOKENS // LENGTH, LENGTH)
    tokens, targets = (torch.randint(256, shape, generator=generator) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

    return step


def _adamw(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _ours_ddp(model: Any, group: Any) -> tuple[Any, Any]:
    from parallel.data import DistributedDataParallel

    return DistributedDataParallel(model, process_group=group), _adamw(model.parameters())


def _torch_ddp(model: Any, group: Any) -> tuple[Any, Any]:
    """As its documentation tunes it: gradients live in the buckets."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    return wrapped, _adamw(model.parameters())


def _ours_zero1(model: Any, group: Any) -> tuple[Any, Any]:
    import torch

    from parallel.data import DistributedDataParallel
    from parallel.zero import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, group, lr=1e-4, fused=True)
    return DistributedDataParallel(model, process_group=group), optimizer


def _torch_zero1(model: Any, group: Any) -> tuple[Any, Any]:
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped, _ = _torch_ddp(model, group)
    options: dict[str, Any] = dict(process_group=group, parameters_as_bucket_view=True, lr=1e-4, fused=True)
    return wrapped, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)


def _sharded(fully_shard: Any, model: Any, mesh: Any) -> tuple[Any, Any]:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, _adamw(model.parameters())


def _ours_fsdp(model: Any, group: Any) -> tuple[Any, Any]:
    from parallel.fsdp import fully_shard

    return _sharded(fully_shard, model, group)


def _torch_fsdp(model: Any, group: Any) -> tuple[Any, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    return _sharded(fully_shard, model, DeviceMesh.from_group(group, "cpu"))


BUILDERS: dict[tuple[str, str], Callable[[Any, Any], tuple[Any, Any]]] = {
    ("ours", "ddp"): _ours_ddp,
    ("torch", "ddp"): _torch_ddp,
    ("ours", "zero1"): _ours_zero1,
    ("torch", "zero1"): _torch_zero1,
    ("ours", "fsdp"): _ours_fsdp,
    ("torch", "fsdp"): _torch_fsdp,
}

# A world finds what to run by its name.
globals()[f"exchange_{EXCHANGED}"] = partial(exchange, EXCHANGED)
for _backend in BACKENDS:
    for _size in SIZES:
        globals()[f"all_reduce_{_backend}_{_size}"] = partial(all_reduce, _backend, _size)
        globals()[f"cpu_{_backend}_{_size}"] = partial(cpu, _backend, _size)
    for _side, _strategy in BUILDERS:
        globals()[f"train_{_side}_{_strategy}_{_backend}"] = partial(train, _side, _strategy, _backend)
