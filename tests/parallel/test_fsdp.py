"""fully_shard: equal to one process and to PyTorch's; what it communicates and holds, to the byte."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import backend_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import kernels
from parallel import link, memory, memory_held
from parallel.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    clip_grad_norm_,
    full_optimizer_state_dict,
    full_state_dict,
    fully_shard,
    load_full_optimizer_state_dict,
    load_full_state_dict,
    predict_communication,
    predict_memory,
    set_prefetch,
    set_requires_gradient_sync,
)
from parallel.fsdp_layout import rows_held

STEPS, BATCH, LENGTH, VOCABULARY, WIDTH = 3, 24, 3, 13, 6
FROZEN = ("blocks.0.up.weight", "blocks.1.down.weight", "blocks.1.norm.bias")


class Block(nn.Module):
    def __init__(self, width, scalar):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5)) if scalar else 0.5

    def forward(self, hidden):
        return hidden + self.scale * self.down(torch.tanh(self.up(self.norm(hidden))))


class Model(nn.Module):
    """A residual network over an embedding; no size divides by 4, few by 2 or 3, and there is a scalar.

    One parameter is used by no sample, one by a few: by those of some ranks, some of the time.
    way: "plain", "checkpointed" (blocks run again in backward) or "looped" (blocks run twice).
    """

    def __init__(self, tied=True, frozen=(), scalar=True, way="plain"):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, scalar) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unused, self.way = nn.Parameter(torch.ones(3)), way
        self.sometimes = nn.Parameter(torch.ones(WIDTH))
        if tied:
            self.head.weight = self.embedding.weight
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        odd = tokens[:, :1, None] > VOCABULARY - 3
        if odd.any():
            hidden = torch.where(odd, hidden * self.sometimes, hidden)
        for block in [*self.blocks] * (2 if self.way == "looped" else 1):
            if self.way == "checkpointed":
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return self.head(hidden)


def build(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return Model(**options).to(dtype)


def units(model):
    return [*model.blocks, model]


def sharded(model, *arguments, apply=fully_shard, **options):
    for unit in units(model):
        apply(unit, *arguments, **options)
    return model


def batches():
    generator = torch.Generator().manual_seed(2)
    tokens, targets = torch.randint(0, VOCABULARY, (2, STEPS, BATCH, LENGTH), generator=generator)
    return list(zip(tokens, targets, strict=True))


def loss_of(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, -2), targets.flatten())


def adamw(model, optimizer=torch.optim.AdamW):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return optimizer([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.03)


def train(model, part=0, parts=1, accumulation=1, optimizer=None, between=None, steps=batches, sync=None):
    """The model after the steps, on one of the parts of each batch."""
    optimizer = optimizer or adamw(model)
    for tokens, targets in steps():
        mine = (tokens.chunk(parts)[part].chunk(accumulation), targets.chunk(parts)[part].chunk(accumulation))
        for index, (inputs, labels) in enumerate(zip(*mine, strict=True)):
            if sync is not None:
                sync(model, index == accumulation - 1)
            (loss_of(model, inputs, labels) / accumulation).backward()
        if between is not None:
            between(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def alone(options, accumulation=1, dtype=torch.float64):
    """State after training in one process, with the accumulation that the ranks together have."""
    return train(build(dtype, **options), accumulation=accumulation).state_dict()


def on_ranks(cases):
    """Whole states after training on every rank's part, one for each (options, sharding, accumulation)."""
    results = []
    for options, sharding, accumulation in cases:
        model = sharded(build(**options), **sharding)
        optimizer = adamw(model, kernels.AdamW if accumulation > 1 else torch.optim.AdamW)
        train(
            model,
            dist.get_rank(),
            dist.get_world_size(),
            accumulation,
            optimizer,
            sync=set_requires_gradient_sync,
        )
        results.append(full_state_dict(model))
    return results


def assert_same(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


SAMPLE = [
    ({}, {}, 1),
    ({"tied": False, "frozen": FROZEN}, {"reshard_after_forward": False}, 2),
    ({"way": "looped"}, {"reshard_after_forward": False}, 1),
    ({"way": "checkpointed"}, {}, 2),
    ({"frozen": FROZEN}, {"offload_policy": CPUOffloadPolicy()}, 1),
]
GRID = [
    ({"tied": tied, "frozen": frozen, "way": way}, {"reshard_after_forward": reshard}, accumulation)
    for tied, frozen, way, reshard, accumulation in itertools.product(
        (True, False), ((), FROZEN), ("plain", "looped", "checkpointed"), (True, False), (1, 2)
    )
]


@functools.cache
def started_and_ended(items):
    """State before and after training in one process, of a model with these options."""
    return build(**dict(items)).state_dict(), alone(dict(items))


def equal_one_process(ranks, world, cases):
    for index, results in enumerate(
        ranks.run(world, on_ranks, cases, timeout=100, backend=backend_of(world))
    ):
        for (options, _, _), found in zip(cases, results, strict=True):
            start, expected = started_and_ended(tuple(options.items()))
            assert_same(found, expected, rtol=1e-12, atol=1e-14)
            for name in options.get("frozen", ()):
                assert torch.equal(found[name], start[name]), index
            assert torch.equal(found["unused"], torch.ones(3).double())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_equals_one_process(ranks, world):
    equal_one_process(ranks, world, SAMPLE)


@pytest.mark.proof
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_equals_one_process_in_every_combination(ranks, world):
    equal_one_process(ranks, world, GRID)


def beside_pytorch(policy):
    """(our shard, PyTorch's) of every parameter after each step, and of its gradient."""
    from torch.distributed import fsdp

    pairs = []
    theirs = fsdp.MixedPrecisionPolicy(*policy)
    models = [
        sharded(build(torch.float32, scalar=False), mp_policy=theirs),
        sharded(build(torch.float32, scalar=False), apply=fsdp.fully_shard, mp_policy=theirs),
    ]
    optimizers = [adamw(model) for model in models]
    for tokens, targets in batches():
        for model in models:
            tokens[:, 0] = VOCABULARY - 1  # PyTorch's does not take parameters that some ranks do not use
            loss_of(model, tokens.chunk(2)[dist.get_rank()], targets.chunk(2)[dist.get_rank()]).backward()
        for mine, other in zip(*(model.named_parameters() for model in models), strict=True):
            assert mine[0] == other[0]
            if other[1].grad is None:
                assert mine[1].grad is None
            else:
                pairs.append((mine[0], mine[1].grad.clone(), other[1].grad.to_local().clone()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        pairs.append((name, mine.detach(), other.detach().to_local()))
    return pairs


@pytest.mark.parametrize("policy", [(), (torch.bfloat16, torch.float32)])
def test_shards_are_pytorchs_bit_for_bit(ranks, policy):
    for pairs in ranks.run(2, beside_pytorch, policy):
        for name, ours, theirs in pairs:
            assert ours.dtype is torch.float32
            assert torch.equal(ours, theirs), (name, ours, theirs)


def gradients(model):
    """Whole gradients by name."""
    named = [(name, p, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {name: p.fsdp.gather(grad) if hasattr(p, "fsdp") else grad for name, p, grad in named}


def mixed():
    """What computes and what comes back in 16 bits: of everything, of compute, of the reduction."""
    seen, found = [], []
    model = build(torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32))
    model.blocks[0].up.register_forward_hook(
        lambda m, a, out: seen.append((a[0].dtype, m.weight.dtype, out.dtype))
    )
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    models = model, sharded(build(torch.bfloat16)), sharded(build(torch.float32), mp_policy=policy)
    for each in models:
        parts = dist.get_world_size() * 2
        for half in range(2):
            set_requires_gradient_sync(each, half == 1)
            tokens, targets = (whole.chunk(parts)[2 * dist.get_rank() + half] for whole in batches()[0])
            (loss_of(each, tokens, targets) / 2).backward()
        trained = [p for p in each.parameters() if p.grad is not None]
        assert all((p.grad.dtype, p.grad.shape) == (p.dtype, p.shape) for p in trained)
        found.append(gradients(each))
    return set(seen), found


@pytest.mark.parametrize("world", [2, 3])
def test_sixteen_bits_compute_and_gradients_are_the_masters(ranks, world):
    """The error is at most twice that of one process in bfloat16; of the reduction alone, float16's own."""

    def error(found):
        off = torch.cat([(found[name].double() - grad).flatten() for name, grad in expected.items()])
        return off.norm() / torch.cat([grad.flatten() for grad in expected.values()]).norm()

    model, low = build(), build(torch.bfloat16)
    for each in (model, low):
        loss_of(each, *batches()[0]).backward()
    expected = gradients(model)
    for seen, (compute, everything, reduction) in ranks.run(world, mixed):
        assert seen == {(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
        assert error(compute) < 2 * error(gradients(low))
        assert error(everything) < 2 * error(gradients(low))
        assert error(reduction) < 2**-10


def replicated(groups):
    mesh = init_device_mesh("cpu", groups)
    model = sharded(build(), mesh)
    train(model, dist.get_rank(), dist.get_world_size(), sync=set_requires_gradient_sync, accumulation=2)
    shards = [p.detach().clone() for p in model.parameters()]
    return full_state_dict(model), shards


@pytest.mark.parametrize("groups", [(2, 2), (4, 1), (1, 3)])
def test_replicas_of_shards_equal_one_process_and_each_other(ranks, groups):
    results = ranks.run(groups[0] * groups[1], replicated, groups)
    expected = alone({})
    for rank, (state, shards) in enumerate(results):
        assert_same(state, expected, rtol=1e-12, atol=1e-14)
        assert all(map(torch.equal, shards, results[rank % groups[1]][1]))
        assert all(map(torch.equal, state.values(), results[0][0].values()))


class Wide(nn.Module):
    """Where parameters outweigh activations: an embedding, blocks and a head that may be tied to it."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(201, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 380), nn.Linear(380, 96)) for _ in range(3))
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 201, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.blocks[1][0].weight.requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Tables(nn.Module):
    """Lookups only, whose kernels need nothing beside inputs and outputs in 16 bits, as matmuls there do."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(200, 97)
        self.blocks = nn.ModuleList(Table(201) for _ in range(3))

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, tokens)
        return hidden


class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.first, self.second = nn.Embedding(rows, 97), nn.Embedding(rows + 3, 97)

    def forward(self, hidden, tokens):
        return hidden + self.first(tokens) + self.second(tokens)


WIDER = MixedPrecisionPolicy(torch.float64, torch.float32)
COSTS = [  # model, tied, reshard_after_forward, policy, prefetch
    (Wide, True, True, None, True),
    (Wide, False, [True, True, True, False], WIDER, True),
    (Wide, False, False, None, True),
    (Wide, True, True, WIDER, False),
    (Tables, False, True, MixedPrecisionPolicy(torch.bfloat16), True),
    (Tables, False, False, MixedPrecisionPolicy(torch.bfloat16, torch.float32), True),
]


def counting_mesh(replicas, backend):
    """(replicas, ranks that split): groups over ``backend`` whose bytes are counted."""
    ranks = torch.arange(dist.get_world_size()).view(replicas, -1)
    name, rank, mine = link.wrap(backend), dist.get_rank(), []
    for lines in (ranks.T, ranks):
        groups = {tuple(line): dist.new_group(line, backend=name) for line in lines.tolist()}
        mine += [group for line, group in groups.items() if rank in line]
    if replicas == 1:
        return mine[1]
    return DeviceMesh.from_group(mine, "cpu", mesh=ranks, mesh_dim_names=("replicate", "shard"))


def costs(replicas, cases, backend="shm", steps=2):
    """Of each case: bytes communicated by a step of two backwards, bytes held and the peak of some steps."""
    found, mesh = [], counting_mesh(replicas, backend)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    for kind, tied, reshard, policy, prefetch in cases:
        model = kind(tied)
        each = reshard if isinstance(reshard, list) else [reshard] * 4
        for unit, reshards in zip(units(model), each, strict=True):
            fully_shard(unit, mesh, reshards, policy)
        set_prefetch(model, prefetch)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

        def backward(model=model):
            model(tokens).sum().backward()

        for _ in range(2):
            backward()
            optimizer.step()
            optimizer.zero_grad()
        with link.counted() as traffic:
            set_requires_gradient_sync(model, False)
            backward()
            set_requires_gradient_sync(model, True)
            backward()
        grads = memory_held.held_bytes(p.grad for p in model.parameters() if p.grad is not None)
        state = memory_held.held_bytes(value for of in optimizer.state.values() for value in of.values())
        peaks = []
        for _ in range(steps):
            optimizer.zero_grad()
            dist.barrier()
            with memory.tracked() as tracker:
                backward()
            peaks.append(tracker.peak_bytes)
        found.append((dict(traffic.payload), memory_held.held_bytes(model.parameters()), grads, state, peaks))
    return found


def predicted_costs(case, world, rank, replicas, backend):
    """(communication of a step of two backwards, memory)."""
    kind, tied, reshard, policy, prefetch = case
    options = {"replicas": replicas, "reshard_after_forward": reshard, "mp_policy": policy}
    with torch.device("meta"):
        model = kind(tied)
    traffic = predict_communication(units(model), world, backwards=2, **options)
    held = predict_memory(
        units(model), world, rank=rank % world, prefetch=prefetch, backend=backend, **options
    )
    return traffic, held


def costs_are_predicted(ranks, world, replicas, cases):
    for rank, found in enumerate(ranks.run(world * replicas, costs, replicas, cases, backend="shm")):
        for case, (traffic, parameters, grads, state, peaks) in zip(cases, found, strict=True):
            communicated, held = predicted_costs(case, world, rank, replicas, "shm")
            assert traffic == communicated, case
            assert (parameters, grads, state) == (held.parameters, held.gradients, held.optimizer), case
            # The least of several steps: a thread that has moved the bytes may hold them for an instant.
            assert min(peaks) == pytest.approx(held.gradients + held.buffers, rel=0.01), case


@pytest.mark.parametrize(
    ("world", "replicas", "cases"),
    [(1, 1, COSTS[:2]), (3, 1, COSTS), (2, 2, [COSTS[1], COSTS[4]]), (1, 2, COSTS[:1])],
)
def test_bytes_communicated_and_held_are_predicted(ranks, world, replicas, cases):
    costs_are_predicted(ranks, world, replicas, cases)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("world", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3), (1, 4)]
)
def test_bytes_are_predicted_in_every_case(ranks, world, replicas):
    costs_are_predicted(ranks, world, replicas, COSTS)


def test_over_gloo_the_peak_has_its_copies(ranks):
    """Between none of them and the copy of every gather under way; whatever its threads hold on to is more,
    and not in all of many steps."""
    for rank, ((*_, peaks),) in enumerate(ranks.run(2, costs, 1, COSTS[:1], "gloo", 10)):
        least, most = (predicted_costs(COSTS[0], 2, rank, 1, backend)[1] for backend in ("shm", "gloo"))
        assert least.buffers < most.buffers
        assert 0.99 * (least.gradients + least.buffers) <= min(peaks)
        assert min(peaks) <= 1.01 * (most.gradients + most.buffers)


def between_steps():
    rank, world = dist.get_rank(), dist.get_world_size()
    model, whole = sharded(build()), build()
    tokens, targets = batches()[0]
    checks = []

    def check(when):
        for (name, shard), (_, parameter) in zip(
            model.named_parameters(), whole.named_parameters(), strict=True
        ):
            rows = parameter.detach().reshape(parameter.shape or (1,))
            start, stop = rows_held(len(rows), world, rank)
            assert torch.equal(shard, rows[start:stop]), (when, name)
            assert shard.fsdp.group.full.nbytes() == 0, (when, name)
        checks.append(when)

    check("after fully_shard")
    with torch.no_grad():
        expected = whole(tokens)
        assert torch.equal(model(tokens), expected)
    check("after forward without gradients")
    output = model(tokens)
    assert torch.equal(output, expected)
    check("after forward")
    loss = F.cross_entropy(output.flatten(0, -2), targets.flatten())
    loss.backward(retain_graph=True)
    check("after backward")
    once = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, 2 * gradient)
    return checks


@pytest.mark.parametrize("world", [1, 3])
def test_outside_of_forward_and_backward_there_are_shards_only(ranks, world):
    assert all(len(checks) == 4 for checks in ranks.run(world, between_steps))


def out_of_the_ordinary():
    """Gradients of two forwards before their backwards, of a forward after one that raised, of a part of the
    model; with and without prefetching, which changes nothing."""
    tokens, targets = batches()[0]
    states = []
    for prefetch in (True, False):
        model = sharded(build(), reshard_after_forward=prefetch)
        set_prefetch(model, prefetch)
        first, second = loss_of(model, tokens[:8], targets[:8]), loss_of(model, tokens[8:], targets[8:])
        second.backward()
        first.backward()
        handle = model.blocks[1].down.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens)
        handle.remove()
        for order in ([0, 1, 2], [1, 0, 2], [2]):  # not the order that was recorded
            hidden = model.blocks[order[0]](torch.ones(2, WIDTH).double())
            for index in order[1:]:
                hidden = model.blocks[index](hidden)
            hidden.sum().backward()
        states.append([p.grad for p in model.parameters()])
    alone = build()
    for part in (slice(8), slice(8, None)):
        loss_of(alone, tokens[part], targets[part]).backward()
    for order in ([0, 1, 2], [1, 0, 2], [2]):
        hidden = torch.ones(2, WIDTH).double()
        for index in order:
            hidden = alone.blocks[index](hidden)
        hidden.sum().backward()
    whole = [
        None if g is None else p.fsdp.gather(g) for p, g in zip(model.parameters(), states[0], strict=True)
    ]
    for found, parameter, one, other in zip(whole, alone.parameters(), *states, strict=True):
        assert (found is None) == (parameter.grad is None)
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=1e-14)
            assert torch.equal(one, other)


def test_unusual_orders_of_forward_and_backward(ranks):
    ranks.run(2, out_of_the_ordinary)


def clipped(norm_type):
    model = sharded(build(), init_device_mesh("cpu", (2, 2)))
    tokens, targets = batches()[0]
    (40 * loss_of(model, tokens, targets)).backward()
    norm = clip_grad_norm_(model, 0.5, norm_type)
    return norm, gradients(model)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_is_by_the_norm_of_whole_gradients(ranks, norm_type):
    model = build()
    (40 * loss_of(model, *batches()[0])).backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type)
    results = ranks.run(4, clipped, norm_type)
    for norm, found in results:
        assert torch.equal(norm, results[0][0])
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-12, atol=1e-14)


def saved():
    model = sharded(build())
    optimizer = adamw(model)
    train(model, dist.get_rank(), dist.get_world_size(), optimizer=optimizer)
    return full_state_dict(model), full_optimizer_state_dict(model, optimizer)


def resumed(state, optimizer_state):
    torch.manual_seed(9 + dist.get_rank())
    model = sharded(Model().double())
    optimizer = adamw(model)
    load_full_state_dict(model, state)
    load_full_optimizer_state_dict(model, optimizer, optimizer_state)
    back = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
    train(model, dist.get_rank(), dist.get_world_size(), optimizer=optimizer)
    errors = []
    for wrong in ({}, {**state, "head.weight": torch.zeros(2, 2)}, {**state, "other": torch.zeros(1)}):
        with pytest.raises(ValueError) as error:
            load_full_state_dict(model, wrong)
        errors.append(str(error.value))
    return back, full_state_dict(model), errors


def test_whole_states_load_at_another_world_size(ranks):
    state, optimizer_state = ranks.run(3, saved)[0]
    model = build()
    optimizer = adamw(model)
    expected = train(train(model, optimizer=optimizer), optimizer=optimizer).state_dict()
    for back, final, errors in ranks.run(2, resumed, state, optimizer_state):
        assert_same(back[0], state, rtol=0, atol=0)
        torch.testing.assert_close(back[1]["state"], optimizer_state["state"], rtol=0, atol=0)
        assert back[1]["param_groups"] == optimizer_state["param_groups"]
        assert_same(final, expected, rtol=1e-11, atol=1e-13)
        assert "missing unused" in errors[0]
        assert "head.weight of (2, 2) where the module has (13, 6)" in errors[1]
        assert "unexpected other" in errors[2]


def raised(action):
    try:
        action()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes():
    rank = dist.get_rank()
    twice, tied, moved = build(), build(), sharded(build())
    fully_shard(twice.blocks[0])
    fully_shard(tied.embedding)
    moved.to(torch.float32)
    return {
        "shape": raised(lambda: fully_shard(nn.Linear(3, 4 + rank))),
        "frozen": raised(lambda: fully_shard(nn.Linear(3, 4).requires_grad_(rank == 0))),
        "more": raised(lambda: fully_shard(nn.Linear(3, 4, bias=rank == 0))),
        "twice": raised(lambda: fully_shard(twice.blocks[0])),
        "tied": raised(lambda: fully_shard(tied)),
        "mesh": raised(lambda: fully_shard(build(), init_device_mesh("cpu", (1, 2, 1)))),
        "reshard": raised(lambda: fully_shard(build(), reshard_after_forward=2)),
        "plain": raised(lambda: full_state_dict(build())),
        "copy": raised(lambda: copy.deepcopy(twice)),
        "moved": raised(lambda: moved(batches()[0][0])),
        "early": raised(lambda: full_optimizer_state_dict(sharded(build()), adamw(build()))),
        "norm": raised(lambda: clip_grad_norm_(moved, 1.0, 0.0)),
    }


def test_what_is_wrong_is_said_on_every_rank(ranks):
    first, second = ranks.run(2, mistakes)
    assert first == second
    expected = {
        "shape": "weight float32 [4, 3] on rank 0, weight float32 [5, 3] on rank 1",
        "frozen": "weight float32 [4, 3] on rank 0, weight float32 [4, 3] (frozen) on rank 1",
        "more": "bias float32 [4] on rank 0, nothing more on rank 1",
        "twice": "was applied to this Block already",
        "tied": "head.weight of Model is tied to a parameter that an earlier fully_shard has sharded",
        "mesh": "a mesh of 1 dimension (shard) or 2 (replicate, shard) is wanted, not 3",
        "reshard": "reshard_after_forward is True or False, not 2",
        "plain": "fully_shard was not applied to this Model nor to a module in it",
        "copy": "TypeError: a module that fully_shard was applied to cannot be copied",
        "moved": "change dtype and device before",
        "early": "make the optimizer after fully_shard",
        "norm": "norm_type is positive or infinity, not 0.0",
    }
    assert first.keys() == expected.keys()
    for name, text in expected.items():
        assert text in first[name], (name, first[name])


def test_prediction_wants_the_root_last():
    model = build()
    with pytest.raises(ValueError, match="units are submodules of the last, the root"):
        predict_communication([model, *model.blocks], 2)
    with pytest.raises(ValueError, match="2 values for 4 units"):
        predict_communication(units(model), 2, reshard_after_forward=[True, False])
