"""The models of the pipeline's tests, and the same training step on one process and on many."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from parallel import schedules
from parallel.pipeline import Pipeline

WIDTH, VOCABULARY, LENGTH = 6, 11, 3


class First(nn.Module):
    """Tokens to states."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens):
        return torch.tanh(self.tokens(tokens))


class Middle(nn.Module):
    """States to states; a normalization, weights with and without bias, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH, bias=False)
        self.up.bias.requires_grad_(False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Last(nn.Module):
    """States to logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x):
        return self.head(x)


def stages_of(count, tied=True, dtype=torch.float64):
    """``count`` stages, whose first has the embedding and whose last the head, which are one tensor."""
    torch.manual_seed(3)
    parts = [[Middle()] for _ in range(count)]
    parts[0].insert(0, First())
    parts[-1].append(Last())
    if tied:
        parts[-1][-1].head.weight = parts[0][0].tokens.weight
    return [nn.Sequential(*part) for part in parts if part] if not dtype else cast(parts, dtype)


def cast(parts, dtype):
    return list(nn.ModuleList([nn.Sequential(*part) for part in parts]).to(dtype))


def batch_of(samples, seed=5):
    """(tokens, targets), each (samples, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCABULARY, (samples, LENGTH), generator=generator) for _ in range(2))


def loss_of(logits, targets):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def alone(stages, batches, scale=1.0):
    """(losses, gradients by stage and name) of one process, whose steps accumulate."""
    stages = copy.deepcopy(nn.ModuleList(stages))
    losses = []
    for tokens, targets in batches:
        x = tokens
        for stage in stages:
            x = stage(x)
        loss = loss_of(x, targets)
        (loss * scale).backward()
        losses.append(loss.item())
    named = stages.named_parameters(remove_duplicate=False)
    return losses, {name: one.grad for name, one in named if one.grad is not None}


def gradients(pipeline):
    """By stage and name, as ``alone``."""
    named = pipeline.stages.named_parameters(remove_duplicate=False)
    return {name: one.grad for name, one in named if one.grad is not None}


def built(name, microbatches, tied=True, dtype=torch.float64, **options):
    """A pipeline of all ranks, of a model of ``stages_of``."""
    schedule = schedules.build(name, dist.get_world_size(), microbatches)
    return Pipeline(stages_of(schedule.stages, tied, dtype), schedule, loss_of, **options)
