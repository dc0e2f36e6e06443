"""fully_shard: equal to one process and to PyTorch's, bit for bit where the order of sums is fixed; exact bytes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel.fsdp import (
    MixedPrecisionPolicy,
    full_state_dict,
    fully_shard,
    set_requires_gradient_sync,
)

STEPS, BATCH, LENGTH, VOCABULARY, WIDTH = 3, 12, 5, 13, 6


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5))  # a scalar is sharded too

    def forward(self, hidden):
        return hidden + self.scale * self.down(torch.tanh(self.up(self.norm(hidden))))


class Model(nn.Module):
    """A residual network over an embedding: no size divides by 4, most not by 2 or 3."""

    def __init__(self, tied=True, frozen=()):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        if tied:
            self.head.weight = self.embedding.weight
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def build(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return Model(**options).to(dtype)


def shard(model, mesh=None, apply=fully_shard, **options):
    for block in model.blocks:
        apply(block, mesh=mesh, **options)
    return apply(model, mesh=mesh, **options)


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(2)
    shape = (steps, BATCH, LENGTH)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(2)]


def loss_of(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, -2), targets.flatten())


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def train(model, rank=0, world=1, accumulation=1, synchronize=set_requires_gradient_sync):
    """The model after STEPS steps on this rank's part of each batch."""
    optimizer = optimizer_of(model)
    for tokens, targets in zip(*batches(), strict=True):
        mine = zip(tokens.chunk(world)[rank].chunk(accumulation), targets.chunk(world)[rank].chunk(accumulation))
        for index, (inputs, labels) in enumerate(mine):
            if world > 1 or rank is None:
                synchronize(model, index == accumulation - 1)
            (loss_of(model, inputs, labels) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(options, accumulation, **sharding):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard(build(**options), **sharding)
    return full_state_dict(train(model, rank, world, accumulation))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process(ranks, world):
    expected = train(build()).state_dict()
    for found in ranks.run(world, trained, {}, 1):
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
