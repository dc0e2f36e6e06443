"""How each strategy is applied to the GPT. The model knows nothing of it.

Every builder seeds alike, so all ranks begin with the same model, whatever their number. All strategies but
``expert`` (another model), ``local_sgd`` and ``diloco`` (other steps) compute what ``single`` computes, to
rounding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from labs.models import formulas
from labs.models.gpt import GPT
from labs.models.layers import FeedForward
from labs.train.options import Options
from labs.train.state import (
    Checkpointed,
    CheckpointedExperts,
    CheckpointedLocal,
    CheckpointedShards,
    CheckpointedTensorParallel,
    CheckpointedZero,
)
from parallel.context import ring_attention, sequence_partition
from parallel.data import DistributedDataParallel
from parallel.expert import MixtureOfExperts
from parallel.expert_state import average_gradients
from parallel.fsdp import fully_shard
from parallel.local_sgd import DiLoCo, LocalSGD
from parallel.memory import tracked
from parallel.mixture import DenseMixtureOfExperts
from parallel.tensor_plan import Column, Row, Style, parallelize
from parallel.vocabulary_loss import vocab_parallel_cross_entropy
from parallel.zero import ZeroRedundancyOptimizer

BALANCE = 0.01
"""Weight of the loss that balances experts (Fedus et al. 2021, section 2.2)."""
VISITED = 2
"""Experts of a block that a token visits, where there are as many."""


class Trainer:
    """A model made parallel, with what a step does. ``shares``: by how many ranks a batch is divided.

    call: (tokens, targets) -> this rank's loss, with a graph. after_backward: what the strategy still does to
    the gradients. optimizer: what steps, where it is not the checkpoint's AdamW itself. penalty: what is
    minimised beside the loss, of the last call. buffer_bytes: what was allocated for good beside the model.
    """

    buffer_bytes = 0

    def __init__(
        self,
        checkpointed: Checkpointed,
        call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        shares: int = 1,
        after_backward: Callable[[], None] = lambda: None,
        optimizer: Any = None,
        penalty: Callable[[], torch.Tensor | float] = lambda: 0.0,
    ) -> None:
        self.checkpointed, self.call, self.penalty = checkpointed, call, penalty
        self.shares, self.after_backward = shares, after_backward
        self.optimizer = optimizer or checkpointed.optimizer

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step of the optimizer; this rank's loss before it."""
        self.optimizer.zero_grad()
        loss = self.call(tokens, targets)
        (loss + self.penalty()).backward()
        self.after_backward()
        self.optimizer.step()
        return loss.detach()


LET_GO_SECONDS = 0.1
"""gloo's thread holds the tensors of a transfer for a moment after whoever waited for it has gone on: those
of the broadcast at the start would count as kept for good."""


def build(options: Options, device: torch.device) -> Trainer:
    """The model on ``device`` by the strategy that is asked for. ValueError: it does not fit the ranks."""
    torch.manual_seed(options.seed)
    with tracked(device) as tracker:
        trainer = BUILDERS[options.strategy](options, device)
        time.sleep(LET_GO_SECONDS)
        gc.collect()  # parameters that were replaced by views or shards are no longer held
    trainer.buffer_bytes = tracker.live_bytes - trainer.checkpointed.held_bytes()
    return trainer


def flops_per_token(options: Options) -> int:
    """The model's own, forward and backward. With experts: those of the ones that a token visits, and of the
    router."""
    config = options.model()
    if options.strategy != "expert":
        return formulas.flops_per_token(config, options.length)
    visited = replace(config, hidden=min(VISITED, options.experts) * config.size_of_hidden)
    router = 3 * 2 * config.width * options.experts * config.layers
    return formulas.flops_per_token(visited, options.length) + router


def loss_of(model: Callable[..., torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def adamw(model: nn.Module, options: Options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=options.learning_rate)


def single(options: Options, device: torch.device) -> Trainer:
    if dist.get_world_size() > 1:
        raise ValueError(f"--strategy single is one process; torchrun started {dist.get_world_size()}")
    model = GPT(options.model()).to(device)
    return Trainer(Checkpointed(model, adamw(model, options)), partial(loss_of, model))


def ddp(options: Options, device: torch.device) -> Trainer:
    model = GPT(options.model()).to(device)
    wrapped = DistributedDataParallel(model)
    return Trainer(
        Checkpointed(model, adamw(model, options)), partial(loss_of, wrapped), shares=dist.get_world_size()
    )


def zero1(options: Options, device: torch.device) -> Trainer:
    model = GPT(options.model()).to(device)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, stage=1, lr=options.learning_rate
    )
    wrapped = DistributedDataParallel(model)
    return Trainer(
        CheckpointedZero(model, optimizer), partial(loss_of, wrapped), shares=dist.get_world_size()
    )


def zero2(options: Options, device: torch.device) -> Trainer:
    model = GPT(options.model()).to(device)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, stage=2, lr=options.learning_rate
    )
    return Trainer(CheckpointedZero(model, optimizer), partial(loss_of, model), shares=dist.get_world_size())


def fsdp(options: Options, device: torch.device, mesh: dist.DeviceMesh | None = None) -> Trainer:
    model = GPT(options.model()).to(device)
    for block in model.blocks:
        fully_shard(block, mesh)
    fully_shard(model, mesh)
    return Trainer(
        CheckpointedShards(model, adamw(model, options)),
        partial(loss_of, model),
        shares=dist.get_world_size(),
    )


def hsdp(options: Options, device: torch.device) -> Trainer:
    world = dist.get_world_size()
    shard = options.shard_size or max(1, world // 2)
    if world % shard:
        raise ValueError(f"--shard-size {shard} does not divide the {world} ranks")
    mesh = init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
    return fsdp(options, device, mesh)


def tensor_plan(options: Options) -> dict[str, Style]:
    """Megatron's: layers before a nonlinearity by columns, those behind it by rows, the vocabulary split."""
    head = options.model().size_of_head
    return {
        "embedding.tokens": "vocabulary",
        "blocks.*.attention": "input",
        "blocks.*.attention.query": Column(unit=head),
        "blocks.*.attention.key": Column(unit=head),
        "blocks.*.attention.value": Column(unit=head),
        "blocks.*.attention.output": Row(unit=head),
        "blocks.*.feed_forward.up": "column",
        "blocks.*.feed_forward.down": "row",
        "head": "column",
    }


def tensor(options: Options, device: torch.device) -> Trainer:
    world = dist.get_world_size()
    if options.heads % world:
        raise ValueError(f"--heads {options.heads} cannot be split evenly over {world} ranks")
    model = parallelize(GPT(options.model()).to(device), tensor_plan(options))

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(model(tokens), targets, vocabulary=options.model().vocabulary)

    return Trainer(CheckpointedTensorParallel(model, adamw(model, options)), loss)


def context(options: Options, device: torch.device) -> Trainer:
    """Each rank has two pieces of every sequence, and keys and values travel round the ring."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if options.length % (2 * world):
        raise ValueError(
            f"--length {options.length} is no multiple of {2 * world}: causal ring attention cuts a sequence "
            f"into two pieces a rank"
        )
    partition = sequence_partition(options.length, world, is_causal=True)
    model = GPT(options.model()).to(device)
    for block in model.blocks:
        block.attention.attend = partial(ring_attention, lengths=partition.sizes)
    positions = partition.take(torch.arange(options.length, device=device), rank, 0)
    wrapped: Any = DistributedDataParallel(model)

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tokens, targets = (partition.take(whole, rank, 1) for whole in (tokens, targets))
        return loss_of(partial(wrapped, positions=positions), tokens, targets)

    return Trainer(Checkpointed(model, adamw(model, options)), loss)


def expert(options: Options, device: torch.device) -> Trainer:
    """Each block's feed-forward layer becomes several, of which a token visits ``VISITED``."""
    model = GPT(options.model())
    layers = []
    for block in model.blocks:
        experts = [FeedForward(options.model()) for _ in range(options.experts)]
        router = nn.Linear(options.width, options.experts, bias=False)
        dense = DenseMixtureOfExperts(router, experts, top_k=min(VISITED, options.experts))
        block.feed_forward = MixtureOfExperts.from_dense(dense)
        layers.append(block.feed_forward)
    model.to(device)

    return Trainer(
        CheckpointedExperts(model, adamw(model, options)),
        partial(loss_of, model),
        shares=dist.get_world_size(),
        after_backward=partial(average_gradients, model),
        penalty=lambda: BALANCE * torch.stack([layer.auxiliary_loss for layer in layers]).mean(),
    )


def local_sgd(options: Options, device: torch.device, kind: type[LocalSGD] = LocalSGD) -> Trainer:
    model = GPT(options.model()).to(device)
    inner = adamw(model, options)
    optimizer = kind(model, inner, every=options.local_steps)
    checkpointed = CheckpointedLocal(model, inner, optimizer)
    return Trainer(checkpointed, partial(loss_of, model), dist.get_world_size(), optimizer=optimizer)


BUILDERS: dict[str, Callable[[Options, torch.device], Trainer]] = {
    "single": single,
    "ddp": ddp,
    "zero1": zero1,
    "zero2": zero2,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tensor": tensor,
    "context": context,
    "expert": expert,
    "local_sgd": local_sgd,
    "diloco": partial(local_sgd, kind=DiLoCo),
}
