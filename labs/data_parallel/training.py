"""The GPT under each strategy, ours and PyTorch's: built alike, stepped alike.

All begin with the same parameters and take the same batches in the same order; ``single`` is one rank by
itself on its share. Peers are in their best configuration: gradients and parameters are views of buckets, and
AdamW is torch's fused one for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from labs.data_parallel.config import Config
    from labs.models.configuration import GPTConfig

OURS = ("ddp", "zero1", "zero2", "fsdp")
TORCH = ("torch_ddp", "torch_zero1", "torch_fsdp")
LEARNING_RATE = 1e-3
BATCHES = 8  # drawn beforehand, and taken in turn
SEED = 0


def adamw() -> dict[str, Any]:
    return {"lr": LEARNING_RATE, "fused": True}


def gpt(configuration: GPTConfig) -> Any:
    """The same model whenever and wherever it is made."""
    import torch

    from labs.models.gpt import GPT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return GPT(configuration)


def batches(config: Config, rank: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The share of ``rank`` of the batch of each step; rank 0 of 1 has the batch of all."""
    from labs.models.text import Batches, standard_library

    drawn = Batches(
        standard_library().train, config.ranks * config.sequences, config.length, SEED, rank, ranks
    )
    return [drawn[step] for step in range(BATCHES)]


def loss_of(forward: Callable[[Any], Any], batch: tuple[Any, Any]) -> Any:
    from torch.nn.functional import cross_entropy

    tokens, targets = batch
    return cross_entropy(forward(tokens).flatten(0, 1), targets.flatten())


class Training:
    """A model under a strategy. forward: what is called; model: the GPT itself, whose parameters the
    strategy may have replaced; group: what is destroyed at the end."""

    def __init__(
        self, forward: Any, model: Any, optimizer: Any, drawn: Sequence[tuple[Any, Any]], group: Any = None
    ) -> None:
        self.forward, self.model, self.optimizer = forward, model, optimizer
        self.drawn, self.group, self.steps = drawn, group, 0

    def loss(self) -> Any:
        """Forward on the next batch."""
        batch = self.drawn[self.steps % len(self.drawn)]
        self.steps += 1
        return loss_of(self.forward, batch)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def parameters(self) -> torch.Tensor:
        """All parameters, whole, as one vector. On every rank."""
        import torch

        from parallel.fsdp import full_state_dict

        names = [name for name, _ in self.model.named_parameters()]
        state: dict[str, Any] = dict(self.model.named_parameters())
        if hasattr(self.model, "fsdp_unit"):
            state = full_state_dict(self.model)
        elif any(hasattr(parameter, "to_local") for parameter in state.values()):
            state = self._gathered(state)
        return torch.cat([state[name].detach().flatten() for name in names])

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """DTensors split along their rows, whole. By hand: ``full_tensor`` remembers the group of the first
        mesh of these ranks, which may be gone."""
        import torch
        import torch.distributed as dist

        shares: list[Any] = [None] * dist.get_world_size(self.group)
        local = {name: parameter.to_local().detach() for name, parameter in state.items()}
        dist.all_gather_object(shares, local, self.group)
        return {name: torch.cat([share[name] for share in shares]) for name in state}

    def close(self) -> None:
        import torch.distributed as dist

        del self.forward, self.model, self.optimizer
        if self.group is not None:
            with contextlib.suppress(ValueError):  # the default group went before, and took it along
                dist.destroy_process_group(self.group)


def build(config: Config, name: str, backend: str = "gloo") -> Training:
    """The strategy over a group of its own on ``backend``; ``single`` needs no torch.distributed."""
    import torch
    import torch.distributed as dist

    model = gpt(config.gpt())
    rank = dist.get_rank() if dist.is_initialized() else 0
    drawn = batches(config, rank, config.ranks)
    if name == "single":
        return Training(model, model, torch.optim.AdamW(model.parameters(), **adamw()), drawn)
    import parallel.shm  # noqa: F401 (registers the backend)

    group = dist.new_group(backend=backend)
    forward, optimizer = BUILDERS[name](model, group)
    return Training(forward, model, optimizer, drawn, group)


def _ddp(model: Any, group: Any) -> tuple[Any, Any]:
    import torch

    from parallel.data import DistributedDataParallel

    forward = DistributedDataParallel(model, process_group=group)
    return forward, torch.optim.AdamW(model.parameters(), **adamw())


def _zero1(model: Any, group: Any) -> tuple[Any, Any]:
    import torch

    from parallel.data import DistributedDataParallel
    from parallel.zero import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, group, **adamw())
    return DistributedDataParallel(model, process_group=group), optimizer


def _zero2(model: Any, group: Any) -> tuple[Any, Any]:
    import torch

    from parallel.zero import ZeroRedundancyOptimizer

    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, group, stage=2, **adamw())


def _fsdp(model: Any, group: Any) -> tuple[Any, Any]:
    from parallel.fsdp import fully_shard

    return _sharded(model, fully_shard, group)


def _torch_ddp(model: Any, group: Any) -> tuple[Any, Any]:
    import torch

    forward = torch.nn.parallel.DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=True
    )
    return forward, torch.optim.AdamW(model.parameters(), **adamw())


def _torch_zero1(model: Any, group: Any) -> tuple[Any, Any]:
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer

    forward, _ = _torch_ddp(model, group)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        torch.optim.AdamW,
        process_group=group,
        parameters_as_bucket_view=True,
        **adamw(),
    )
    return forward, optimizer


def _torch_fsdp(model: Any, group: Any) -> tuple[Any, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    return _sharded(model, fully_shard, DeviceMesh.from_group(group, "cpu"))


def _sharded(model: Any, fully_shard: Callable[..., Any], mesh: Any) -> tuple[Any, Any]:
    import torch

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), **adamw())


BUILDERS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "ddp": _ddp,
    "zero1": _zero1,
    "zero2": _zero2,
    "fsdp": _fsdp,
    "torch_ddp": _torch_ddp,
    "torch_zero1": _torch_zero1,
    "torch_fsdp": _torch_fsdp,
}
