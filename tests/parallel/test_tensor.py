"""Tensor and sequence parallelism equal the single-process model, and move and hold what they predict."""

import copy
import functools
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import backend_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from parallel import fsdp, link, tensor_plan, tensor_prediction, vocabulary_loss
from parallel.memory_held import held_bytes
from parallel.partition import concatenated, split, split_heads
from parallel.sequence import SequenceParallel, draw_apart
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, predict_memory
from parallel.tensor_plan import Column, Divided, Row, parallelize
from parallel.tensor_state import full_state_dict, full_tensors, load_full_state_dict
from parallel.vocabulary import VocabParallelEmbedding
from parallel.vocabulary_loss import vocab_parallel_cross_entropy

TOKENS, WIDTH, HEAD = 53, 48, 8
EXACT = 1e-12
# Sums in another order are rounded otherwise, and each step carries it on. What that makes of float32 differs
# by case: one process in float32 shows it.
ROUNDINGS = 4


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
    """(largest relative distance of losses, gradients and parameters over three steps of two accumulated
    batches from one process in float64, that of one process in ``dtype``)."""
    torch.manual_seed(7)
    alone = Model(**options)
    for name in frozen:
        alone.get_submodule(name).requires_grad_(False)
    exact, alone = copy.deepcopy(alone).double(), alone.to(dtype)
    model = copy.deepcopy(alone)
    if dist.get_rank():  # whatever the others start from, the first rank's values count
        torch.nn.init.normal_(next(model.parameters()))
    parallelize(model, plan_of(model, dist.get_world_size(), sequence, shared_input), sequence=sequence)
    if options.get("tied", True):
        assert model.head.weight is model.embedding.weight
    trained = {"parallel": model, "alone": alone, "exact": exact}
    # Not Adam: it makes of a gradient that is zero but for rounding (a key's bias) a full step.
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1) for m in trained.values()
    ]
    worst = dict.fromkeys(("parallel", "alone"), 0.0)

    def compare(states):
        for name in worst:
            worst[name] = max(worst[name], distance(states[name], states["exact"]))

    for step, (tokens, target) in enumerate(batches(6, length)):
        losses = {
            name: F.cross_entropy(trained[name](tokens).flatten(0, 1), target.flatten())
            for name in ("alone", "exact")
        }
        losses["parallel"] = vocab_parallel_cross_entropy(model(tokens), target, vocabulary=TOKENS)
        compare({name: {"loss": loss.detach()} for name, loss in losses.items()})
        for loss in losses.values():
            loss.backward()
        if step % 2:
            gradients = {
                name: {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
                for name, m in trained.items()
            }
            compare(gradients | {"parallel": full_tensors(model, gradients["parallel"])})
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    compare({name: m.state_dict() for name, m in trained.items()} | {"parallel": full_state_dict(model)})
    return worst["parallel"], worst["alone"]


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3))
        for name in wanted
    )


def many(cases):
    return [trains_as_one(*case) for case in cases]


def check_training(ranks, world, cases, timeout=60):
    for found in ranks.run(world, many, cases, timeout=timeout, backend=backend_of(world)):
        for case, (worst, alone) in zip(cases, found, strict=True):
            assert worst < max(EXACT, ROUNDINGS * alone), (case, worst, alone)


# (model, sequence parallel, inputs shared, dtype, length, frozen)
SHARED_KEYS = {"heads": 6, "kv_heads": 1}
FUSED = {"heads": 8, "kv_heads": 2, "fused": True}
UNTIED = {"kv_heads": 6, "tied": False, "hidden": 3}
FROZEN = ("blocks.0.norm", "blocks.1.gate_up", "blocks.0.attention.output")


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [(FUSED, True, True, torch.float64, 9, ())]),
        (2, [({}, True, False, torch.float64, 9, ()), (SHARED_KEYS, False, True, torch.float32, 8, ())]),
        (
            3,
            [
                (SHARED_KEYS, True, True, torch.float64, 8, FROZEN),
                (UNTIED, False, False, torch.float64, 7, ()),
            ],
        ),
        (4, [(FUSED, True, False, torch.float64, 10, ())]),
    ],
)
def test_training_equals_one_process(ranks, world, cases):
    check_training(ranks, world, cases)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_equals_one_process_in_every_case(ranks, world, dtype):
    models = [{}, SHARED_KEYS, FUSED, UNTIED]
    cases = [
        (options, sequence, shared, dtype, length, frozen)
        for options in models
        for sequence in (False, True)
        for shared in (False, True)
        for length, frozen in ((8, ()), (7, ("embedding", "norm")), (3, FROZEN[:1]))
    ]
    check_training(ranks, world, cases, timeout=500)


def moves_what_is_predicted(options, sequence, shared_input, dtype, length, frozen):
    """(payload, prediction) of forward, loss and backward."""
    torch.manual_seed(7)
    model = Model(**options).to(dtype)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    world = dist.get_world_size()
    parallelize(model, plan_of(model, world, sequence, shared_input), sequence=sequence)
    ((tokens, target),) = batches(1, length)
    with link.counted() as traffic:
        vocab_parallel_cross_entropy(model(tokens), target, vocabulary=TOKENS).backward()
    wanted = Counter(tensor_prediction.predict_communication(model, *tokens.shape, dtype.itemsize))
    wanted += Counter(vocabulary_loss.predict_communication(tokens.numel(), world, max(4, dtype.itemsize)))
    return dict(traffic.payload), dict(wanted)


def many_counted(cases):
    return [moves_what_is_predicted(*case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_communication_is_what_is_predicted(ranks, world):
    cases = [
        (options, sequence, shared, dtype, 9, frozen)
        for options, dtype, frozen in (
            ({}, torch.float32, ()),
            (
                {"kv_heads": 1},
                torch.bfloat16,
                ("blocks.1.gate_up", "blocks.0.norm", "blocks.1.attention.output"),
            ),
        )
        for sequence in (False, True)
        for shared in (False, True)
    ]
    for found in ranks.run(world, many_counted, cases, backend="link"):
        for case, (payload, wanted) in zip(cases, found, strict=True):
            assert payload == wanted, case
            assert world == 1 or sum(payload.values()) > 0


def close_in_bfloat16(world_of_cases):
    """(largest distance from float64, that of one process in bfloat16) of logits and gradients."""
    found = []
    for sequence in world_of_cases:
        torch.manual_seed(7)
        exact = Model(heads=8, kv_heads=2, hidden=24).double()
        alone = copy.deepcopy(exact).bfloat16()
        model = copy.deepcopy(alone)
        parallelize(model, plan_of(model, dist.get_world_size(), sequence, True), sequence=sequence)
        ((tokens, target),) = batches(1, 12)
        for other in (exact, alone):
            F.cross_entropy(other(tokens).flatten(0, 1).float(), target.flatten()).backward()
        loss = vocab_parallel_cross_entropy(model(tokens), target, vocabulary=TOKENS)
        assert loss.dtype == torch.float32
        loss.backward()
        truth = {name: p.grad for name, p in exact.named_parameters()}
        ours = full_tensors(model, {name: p.grad for name, p in model.named_parameters()})
        theirs = {name: p.grad for name, p in alone.named_parameters()}
        found.append([rms({n: g.double() for n, g in grads.items()}, truth) for grads in (ours, theirs)])
    return found


def rms(found, wanted):
    assert found.keys() == wanted.keys()
    errors = [(found[name] - wanted[name]).square().sum() for name in wanted]
    return float(sum(errors).sqrt())


@pytest.mark.parametrize("world", [2, 4])
def test_bfloat16_is_as_exact_as_one_process(ranks, world):
    for results in ranks.run(world, close_in_bfloat16, (False, True)):
        for ours, theirs in results:
            assert ours <= 1.5 * theirs


def autocast_equals():
    torch.manual_seed(7)
    exact = Model(heads=8, kv_heads=2, hidden=24)
    model = copy.deepcopy(exact)
    parallelize(model, plan_of(model, dist.get_world_size(), True, False), sequence=True)
    ((tokens, target),) = batches(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        alone = F.cross_entropy(exact(tokens).flatten(0, 1).float(), target.flatten())
        loss = vocab_parallel_cross_entropy(model(tokens), target, vocabulary=TOKENS)
    alone.backward()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    ours = full_tensors(model, {name: p.grad for name, p in model.named_parameters()})
    return distance_of_all(ours, {name: p.grad for name, p in exact.named_parameters()})


def distance_of_all(found, wanted):
    return rms(found, wanted) / rms({n: torch.zeros_like(g) for n, g in wanted.items()}, wanted)


def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(ranks):
    assert max(ranks.run(2, autocast_equals)) < 2e-2


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def equals_dtensor(sequence):
    """Against torch's own ColwiseParallel and RowwiseParallel: (largest distance, our bytes, theirs)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from parallel import link

    torch.manual_seed(3)
    ours = Feed().double()
    theirs = copy.deepcopy(ours)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = Shard(1) if sequence else Replicate()
    plan = {"up": ColwiseParallel(input_layouts=place), "down": RowwiseParallel(output_layouts=place)}
    parallelize_module(theirs, mesh, plan)
    parallelize(ours, {"up": "column", "down": "row"}, mesh.get_group(), sequence=sequence)
    whole = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    results, moved = [], []
    for model in (ours, theirs):
        x = whole.clone().requires_grad_()
        if sequence:  # each model is given this rank's shard of the sequence
            shards = ours.tensor_parallel.sequence
            shard = shards.scatter(x).detach().requires_grad_()
        else:
            shard = x
        with link.counted() as traffic:
            output = model(shard)
            output.square().sum().backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        if model is ours:
            grads = list(full_tensors(ours, {n: p.grad for n, p in ours.named_parameters()}).values())
        results.append([output, shard.grad, *grads])
        moved.append(dict(traffic.payload))
    distances = [float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)]
    return max(distances), *moved


@pytest.mark.parametrize("sequence", [False, True])
def test_equals_dtensor_and_moves_as_much(ranks, sequence):
    for worst, ours, theirs in ranks.run(2, equals_dtensor, sequence, backend="link"):
        assert worst < 1e-12
        extra = Counter(all_gather=2 * tensor_plan.SIGNATURE_BYTES)  # the ranks agree on shapes
        if sequence:  # the whole input is gathered again, not kept; the bias's gradient is summed at once
            extra += Counter(all_gather=2 * 8 * WIDTH * 8, all_reduce=WIDTH * 8)
        assert ours == Counter(theirs) + extra


def with_data_parallel(fully_shard, whole_state):
    """Tensor parallel within rows of a 2 x 2 mesh, sharded over its columns, against one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(7)
    alone = Model().double()
    model = copy.deepcopy(alone)
    parallelize(model, plan_of(model, 2, True, True), mesh["tensor"].get_group(), sequence=True)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (alone, model)]
    for tokens, target in batches(3, 9, batch=4):
        mine = slice(2 * mesh.get_local_rank("data"), 2 * mesh.get_local_rank("data") + 2)
        halves = [
            F.cross_entropy(alone(tokens[h]).flatten(0, 1), target[h].flatten())
            for h in (slice(2), slice(2, 4))
        ]
        (sum(halves) / 2).backward()
        vocab_parallel_cross_entropy(
            model(tokens[mine]), target[mine], mesh["tensor"].get_group(), vocabulary=TOKENS
        ).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return distance(full_tensors(model, whole_state(model)), alone.state_dict())


def with_our_fsdp():
    return with_data_parallel(fsdp.fully_shard, fsdp.full_state_dict)


def with_pytorchs_fsdp():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def whole_state(model):
        state = model.state_dict().items()
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state}

    return with_data_parallel(fully_shard, whole_state)


@pytest.mark.parametrize("way", [with_our_fsdp, with_pytorchs_fsdp])
def test_two_dimensions_with_fsdp(ranks, way):
    assert max(ranks.run(4, way)) < 1e-12


def two_dimensions_counted():
    """[(payload, prediction)] of a step, over both groups together; predicted before anything is sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found = []
    for sequence in (False, True):
        torch.manual_seed(7)
        model = Model()
        parallelize(model, plan_of(model, 2, sequence, True), mesh["tensor"].get_group(), sequence=sequence)
        units = [*model.blocks, model]
        ((tokens, target),) = batches(1, 9, batch=2)
        wanted = Counter(fsdp.predict_communication(units, 2))
        wanted += Counter(tensor_prediction.predict_communication(model, *tokens.shape, 4))
        wanted += Counter(vocabulary_loss.predict_communication(tokens.numel(), 2))
        for unit in units:
            fsdp.fully_shard(unit, mesh=mesh["data"])
        with link.counted() as traffic:
            logits = model(tokens)
            vocab_parallel_cross_entropy(
                logits, target, mesh["tensor"].get_group(), vocabulary=TOKENS
            ).backward()
        found.append((dict(traffic.payload), dict(wanted)))
    return found


def test_two_dimensions_move_what_both_predict(ranks):
    for found in ranks.run(4, two_dimensions_counted, backend="link"):
        for payload, wanted in found:
            assert payload == wanted


def losses():
    """Largest distance from torch's loss and gradient: reductions, smoothing, ignored targets."""
    world, rank = dist.get_world_size(), dist.get_rank()
    worst = 0.0
    for vocabulary in (31, world, max(1, world - 1)):
        partition = split(vocabulary, world)
        generator = torch.Generator().manual_seed(2)
        whole = 50 * torch.randn(2, 5, vocabulary, generator=generator, dtype=torch.float64)
        target = torch.randint(vocabulary, (2, 5), generator=generator)
        target[1, 2:4] = -1
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.2):
                options = {"ignore_index": -1, "reduction": reduction, "label_smoothing": smoothing}
                x = whole.clone().requires_grad_()
                expected = F.cross_entropy(x.flatten(0, 1), target.flatten(), **options)
                shard = partition.take(whole, rank, 2).clone().requires_grad_()
                loss = vocab_parallel_cross_entropy(shard, target, partition=partition, **options)
                assert loss.shape == (target.shape if reduction == "none" else ())
                expected.sum().backward()
                loss.sum().backward()
                worst = max(worst, float((loss.flatten() - expected.flatten()).detach().abs().max()))
                if shard.numel():
                    wanted = partition.take(x.grad, rank, 2)
                    worst = max(worst, float((shard.grad - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("world", [1, 2, 3])
def test_cross_entropy_is_torchs(ranks, world):
    assert max(ranks.run(world, losses)) < 1e-12


def layers():
    """Single layers: gathering, whole inputs, uneven and empty shards, padding rows, equal initialisation."""
    world, group = dist.get_world_size(), None
    for features in (7, world - 1 or 1):
        torch.manual_seed(4)
        linear = nn.Linear(5, features).double()
        torch.manual_seed(4)
        column = ColumnParallelLinear(5, features, gather_output=True).double()
        row = RowParallelLinear.from_linear(nn.Linear(features, 3).double(), input_is_parallel=False)
        x = torch.randn(2, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(column(x), linear(x), rtol=1e-13, atol=1e-13)
        whole = full_tensors(row, {"weight": row.weight})["weight"]
        expected = F.linear(linear(x), whole, row.bias)
        torch.testing.assert_close(row(column(x)), expected, rtol=1e-13, atol=1e-13)
    embedding = nn.Embedding(9, 4, padding_idx=-2).double()
    ours = VocabParallelEmbedding.from_embedding(embedding, group)
    tokens = torch.tensor([[0, 7, 8], [7, 7, 3]])
    for module in (embedding, ours):
        module(tokens).square().sum().backward()
    torch.testing.assert_close(ours(tokens), embedding(tokens), rtol=0, atol=0)
    grad = full_tensors(ours, {"weight": ours.weight.grad})["weight"]
    torch.testing.assert_close(grad, embedding.weight.grad, rtol=1e-14, atol=0)
    with pytest.raises(IndexError, match="tokens from 3 to 9; the vocabulary has 9"):
        ours(tokens.clamp(min=3) + (tokens == 8))
    return True


@pytest.mark.parametrize("world", [1, 2, 3])
def test_single_layers(ranks, world):
    assert all(ranks.run(world, layers))


def single_layers_counted():
    """[(payload, prediction)] of layers outside of ``parallelize``, which compare their inputs themselves."""
    x = torch.randn(2, 4, 5, requires_grad=True)
    tokens, found = torch.randint(9, (2, 4)), []
    row, embedding = RowParallelLinear(7, 3), VocabParallelEmbedding(9, 5)
    mine = torch.randn(2, 4, row.partition.sizes[dist.get_rank()], requires_grad=True)
    for layer, input in ((ColumnParallelLinear(5, 7), x), (row, mine), (embedding, tokens)):
        with link.counted() as traffic:
            layer(input).sum().backward()
        found.append((dict(traffic.payload), dict(layer.predict_communication(2, 4, 4))))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_single_layers_move_what_they_predict(ranks, world):
    for found in ranks.run(world, single_layers_counted, backend="link"):
        for payload, wanted in found:
            assert payload == wanted
            assert world == 1 or "all_gather" in wanted


def state_round_trip():
    torch.manual_seed(7)
    whole = Model(tied=False)
    model = copy.deepcopy(whole)
    parallelize(model, plan_of(model, dist.get_world_size(), False, False))
    other = Model(tied=False)
    parallelize(other, plan_of(other, dist.get_world_size(), False, False))
    load_full_state_dict(other, full_state_dict(model))
    found, wanted = full_state_dict(other), whole.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.feed = nn.LayerNorm(WIDTH), nn.Dropout(0.5), Feed()
        self.feed.down.register_forward_pre_hook(lambda _, x: F.dropout(x[0], 0.5))
        self.end = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.feed(self.drop(x)))
        return self.end(x)


def dropout(sequence):
    """(output, state of the generator afterwards, dropped fraction) of a model on uneven shards."""
    model = Dropping()
    plan = {"feed": "input", "feed.up": "column", "feed.down": "row"}
    if sequence:
        plan |= {"drop": "scatter", "norm": "gather"}
    parallelize(model, plan, sequence=sequence)
    torch.manual_seed(9)
    output = model(torch.ones(2, 5, WIDTH))
    return output.tolist(), torch.get_rng_state().tolist(), float((output == 0).double().mean())


@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_leaves_the_ranks_in_step(ranks, sequence):
    first, *others = ranks.run(3, dropout, sequence)
    assert all(other == first for other in others)
    assert 0.4 < first[2] < 0.6


def streams():
    """What each rank draws in a module that sees a shard, in training and not."""
    module = nn.Dropout(0.5)
    draw_apart(module, dist.get_rank())
    torch.manual_seed(9)
    drawn = module(torch.ones(64)).tolist()
    module.eval()
    before = torch.get_rng_state()
    module(torch.ones(64))
    return drawn, torch.equal(before, torch.get_rng_state())


def test_each_rank_draws_its_own_numbers_for_a_shard(ranks):
    (first, idle), (second, _) = ranks.run(2, streams)
    assert first != second
    assert idle


def test_a_state_dict_goes_out_and_in_bit_for_bit(ranks):
    assert all(ranks.run(3, state_round_trip))


def wrong():
    """What each wrong call says, on every rank."""
    rank, messages = dist.get_rank(), []

    def said(function, *arguments, **options):
        with pytest.raises(ValueError) as caught:
            function(*arguments, **options)
        messages.append(str(caught.value))

    def plan(lines, sequence=False, **options):
        said(parallelize, Model(**options), lines, sequence=sequence)

    plan({"blocks.*.atention.query": "column"})
    plan({"blocks.*.down": "rows"})
    plan({"norm": "row"})
    plan({"norm": "sequence"})
    plan({"embedding": "vocabulary"})
    plan({"blocks.*.down": "row", "blocks.0.down": "row"})
    plan({"blocks.*.attention.heads": "divided"}, heads=1, kv_heads=1)
    plan({"blocks.*.attention.query": Column(unit=7)})
    plan({"blocks.*.down": Row(partition=split(20, 2))})
    plan({"blocks.*.attention.output": Row(partition=split_heads(2, 1, 24, 2)[1])}, heads=3)
    said(parallelize, Model(hidden=20 + rank), {"blocks.*.down": "row"})
    model = Model()
    parallelize(model, plan_of(model, 2, False, False))
    said(model, torch.zeros(2, 3 + rank, dtype=torch.int64))
    said(model, torch.zeros(2, 3, dtype=torch.int32 if rank else torch.int64))
    said(RowParallelLinear(8, 4), torch.zeros(2, 8))
    said(RowParallelLinear(8, 4), torch.zeros(2 + rank, 4))
    said(ColumnParallelLinear(8, 4), torch.zeros(2, 8 + rank))
    said(ColumnParallelLinear(8, 4), torch.zeros(2 + rank, 8))
    said(VocabParallelEmbedding(9, 4), torch.zeros(2, 3 + rank, dtype=torch.int64))
    said(SequenceParallel().gather, torch.zeros(1, 2, 3))
    shards = SequenceParallel()
    shards.scatter(torch.zeros(1, 7, 3))
    said(ColumnParallelLinear(3, 4, sequence=shards), torch.zeros(1, 4, 3))
    said(shards.gather, torch.zeros(1, 2, 3))
    said(vocab_parallel_cross_entropy, torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), vocabulary=12)
    said(vocab_parallel_cross_entropy, torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
    said(VocabParallelEmbedding.from_embedding, nn.Embedding(9, 2, max_norm=1.0))
    with pytest.raises(IndexError, match="a target lies outside the vocabulary of 10"):
        vocab_parallel_cross_entropy(torch.zeros(1, 5), torch.tensor([10]), vocabulary=10)
    return messages


def test_what_is_wrong_is_said_on_every_rank(ranks):
    for messages in ranks.run(2, wrong):
        expected = [
            "blocks.*.atention.query is no submodule; the nearest is blocks..*attention.query",
            "'rows' is not a style; they are column, ",
            "norm is a LayerNorm; Row wants nn.Linear",
            "norm: sequence needs sequence=True",
            "head.weight is tied to embedding.weight, which is split",
            "blocks.0.down fits two lines of the plan",
            r"blocks.0.attention.heads=1 gives \[1, 0\] to the 2 ranks",
            "blocks.0.attention.query: 48 elements in units of 7",
            "blocks.0.down: the partition is of 20 features over 2 ranks; the layer splits 21 over 2",
            "blocks.0.attention.output: ranks share input features",
            r"blocks.0.gate_up.weight float32 \[40, 48\] on rank 0, .* \[42, 48\] on rank 1",
            r"rank 0 has \(2, 3\) int64.* rank 1 has \(2, 4\) int64",
            r"rank 0 has \(2, 3\) int64.* rank 1 has \(2, 3\) int32",
            "got 8 input features and holds 4 of 8",
            r"the input of a RowParallelLinear .* rank 0 has \(2, 0\) float32; rank 1 has \(3, 0\) float32",
            r"(on rank 1, which says how|rank 1 got an input \(2, 9\) for a layer of 8 input features)",
            r"the input of a ColumnParallelLinear .* rank 0 has \(2, 0\) .* rank 1 has \(3, 0\)",
            r"the input of a VocabParallelEmbedding .* rank 0 has \(2, 3\) .* rank 1 has \(2, 4\)",
            "no sequence has been split yet",
            r"(on rank 1, which says how|it has 3 of 7 as its shard of the sequence)",
            r"has 2 elements along dimension 1 of a shard of 7 that is split over 2 ranks as \[4, 3\]",
            r"with the partition the logits are \(3, 6\)",
            "vocabulary .* or partition says which logits",
            "max_norm, sparse and scale_grad_by_freq",
        ]
        for message, pattern in zip(messages, expected, strict=True):
            assert re.search(pattern, message), (pattern, message)


def keep_in(saved, tensor):
    saved.append(tensor)
    return tensor


def kept():
    """[(bytes of parameters, gradients, moments, saved tensors), prediction] of layers."""
    rank, found = dist.get_rank(), []
    for sequence in (None, SequenceParallel()):
        for trains in (True, False):
            column = ColumnParallelLinear(12, 21, sequence=sequence)
            row = RowParallelLinear(21, 10, sequence=sequence)
            column.weight.requires_grad_(trains)
            row.weight.requires_grad_(trains)
            whole = torch.randn(2, 9, 12)
            first = (whole if sequence is None else sequence.scatter(whole)).requires_grad_()
            second = torch.randn(2, 9, row.partition.sizes[rank], requires_grad=True)
            for layer, x in ((column, first), (row, second)):
                saved = []
                optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad])
                keep = functools.partial(keep_in, saved)
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = layer(x)
                output.sum().backward()
                optimizer.step()
                weights = held_bytes(layer.parameters())
                parts = (
                    weights,
                    held_bytes(p.grad for p in layer.parameters() if p.grad is not None),
                    held_bytes(t for s in optimizer.state.values() for t in s.values() if t.dim()),
                    held_bytes([*layer.parameters(), *saved]) - weights,
                )
                found.append((parts, predict_memory(layer, 2, 9, 4)))
    return [(parts, (m.parameters, m.gradients, m.optimizer, m.buffers)) for parts, m in found]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_memory_is_what_is_predicted(ranks, world):
    for found in ranks.run(world, kept):
        for parts, wanted in found:
            assert parts == wanted
