"""Tensor and sequence parallelism equal the single-process model, move what they predict, and say what is wrong."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel import tensor_plan
from parallel.partition import Partition, concatenated, split, split_heads
from parallel.sequence import SequenceParallel
from parallel.tensor import ColumnParallelLinear, RowParallelLinear
from parallel.tensor_plan import Column, Divided, Row, full_state_dict, full_tensors, parallelize
from parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy

TOKENS, WIDTH, HEAD = 53, 48, 8
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}


class Attention(nn.Module):
    def __init__(self, heads, kv_heads, fused):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        if fused:
            self.query_key_value = nn.Linear(WIDTH, (heads + 2 * kv_heads) * HEAD)
        else:
            self.query = nn.Linear(WIDTH, heads * HEAD)
            self.key = nn.Linear(WIDTH, kv_heads * HEAD, bias=False)
            self.value = nn.Linear(WIDTH, kv_heads * HEAD)
        self.output = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x):
        if hasattr(self, "query_key_value"):
            sizes = [self.heads * HEAD, self.kv_heads * HEAD, self.kv_heads * HEAD]
            parts = self.query_key_value(x).split(sizes, -1)
        else:
            parts = self.query(x), self.key(x), self.value(x)
        query, key, value = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, heads, kv_heads, hidden, fused):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(heads, kv_heads, fused)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, heads=6, kv_heads=3, hidden=21, fused=False, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block(heads, kv_heads, hidden, fused) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plan_of(model, world, sequence, shared_input):
    attention = model.blocks[0].attention
    query, key = split_heads(attention.heads, attention.kv_heads, HEAD, world)
    at = "blocks.*.attention"
    plan = {
        "embedding": "vocabulary",
        f"{at}.heads": Divided([size // HEAD for size in query.sizes]),
        f"{at}.kv_heads": Divided([size // HEAD for size in key.sizes]),
        f"{at}.output": Row(partition=query),
        "blocks.*.gate_up": Column(sections=2),
        "blocks.*.down": "row",
        "head": "column",
    }
    if hasattr(attention, "query"):
        plan |= {f"{at}.query": Column(partition=query)}
        plan |= {f"{at}.key": Column(partition=key), f"{at}.value": Column(partition=key)}
    else:
        plan[f"{at}.query_key_value"] = Column(partition=concatenated([query, key, key]))
    if shared_input:
        plan[at] = "input"
    if sequence:
        plan |= {"blocks.0": "scatter", "blocks.*.norm*": "sequence", "norm": "sequence"}
    return plan


def batches(steps, length, batch=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (batch, length + 1), generator=generator)
        target = tokens[:, 1:].clone()
        target[0, :2] = -100
        yield tokens[:, :-1], target


def trains_as_one(options, sequence, shared_input, dtype, length, frozen):
    """Largest relative distance of losses and of parameters after three steps of two accumulated batches."""
    torch.manual_seed(7)
    alone = Model(**options).to(dtype)
    for name in frozen:
        alone.get_submodule(name).requires_grad_(False)
    model = copy.deepcopy(alone)
    parallelize(model, plan_of(model, dist.get_world_size(), sequence, shared_input), sequence=sequence)
    if options.get("tied", True):
        assert model.head.weight is model.embedding.weight
    # Not Adam: it makes of a gradient that is zero but for rounding (a key's bias) a full step.
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1) for m in (alone, model)]
    worst = 0.0
    for step, (tokens, target) in enumerate(batches(6, length)):
        expected = F.cross_entropy(alone(tokens).flatten(0, 1), target.flatten())
        loss = vocab_parallel_cross_entropy(model(tokens), target, vocabulary=TOKENS)
        worst = max(worst, float((loss - expected).detach().abs() / expected.detach()))
        expected.backward()
        loss.backward()
        if step % 2:
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            wanted = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            worst = max(worst, distance(full_tensors(model, gradients), wanted))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return max(worst, distance(full_state_dict(model), alone.state_dict()))


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3))
        for name in wanted
    )


def many(cases):
    return [trains_as_one(*case) for case in cases]


HEADS = ({}, {"kv_heads": 1}, {"heads": 6, "kv_heads": 2, "fused": True}, {"kv_heads": 6, "tied": False})


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_equals_one_process(ranks, world):
    heads = [options for options in HEADS if world < 4 or options.get("kv_heads", 3) != 3][:3]
    if world == 4:
        heads = [{"heads": 8, "kv_heads": 2, "fused": True}, {"kv_heads": 6, "tied": False, "hidden": 3}]
    cases = [
        (options, sequence, bool(number % 2), torch.float64, 9 + number, ())
        for number, options in enumerate(heads)
        for sequence in (False, True)
    ]
    cases.append((HEADS[1], True, True, torch.float64, 8, ("blocks.0.norm", "blocks.1.gate_up", "blocks.0.attention.output")))
    cases.append((HEADS[1], False, False, torch.float64, 8, ("embedding", "blocks.0.attention.key")))
    cases.append((HEADS[1], True, False, torch.float32, 8, ()))
    for found in ranks.run(world, many, cases):
        for case, worst in zip(cases, found, strict=True):
            assert worst < EXACT[case[3]], (case, worst)
