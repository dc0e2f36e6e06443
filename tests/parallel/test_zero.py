"""ZeroRedundancyOptimizer, both stages, against the plain optimizer in one process and against PyTorch's."""

import contextlib
import copy
import functools
import itertools
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from ranks import backend_of
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer as TorchZero

import kernels
from parallel import link, memory, memory_held
from parallel.data import DistributedDataParallel
from parallel.data import predict_communication as predict_averaging
from parallel.shards import cut, padded
from parallel.zero import ZeroRedundancyOptimizer, predict_communication, predict_memory

SMALL = 2e-4  # MiB of a bucket, so that a small model has several


class Model(nn.Module):
    """Tied weights, a frozen parameter, one without dimensions, sizes that no world size divides."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.first.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.last(torch.tanh(self.first(self.embedding(tokens))) * self.scale))


def built(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Model().to(dtype)


def loss_of(model, tokens):
    logits = model(tokens).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, tokens.flatten())


def batches(steps, accumulation, world_size):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 11, (steps, accumulation, world_size, 4, 5), generator=generator)


def trainable(model):
    return [param for param in model.parameters() if param.requires_grad]


def train(model, optimizer, tokens, rank, no_sync):
    for step in tokens:
        optimizer.zero_grad()
        for number, micro in enumerate(step):
            waits = no_sync is not None and number < len(step) - 1
            with no_sync() if waits else contextlib.nullcontext():
                (loss_of(model, micro[rank]) / len(step)).backward()
        optimizer.step()


def train_alone(model, optimizer, tokens):
    for step in tokens:
        optimizer.zero_grad()
        for micro in step:
            (loss_of(model, micro.flatten(0, 1)) / len(step)).backward()
        optimizer.step()


KINDS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "kernels": (kernels.AdamW, {"lr": 1e-2}),
}


def distributed(stage, kind, dtype, cap, synchronised):
    """(module, model to call, optimizer, its no_sync or None)."""
    module = built(dtype, dist.get_rank())
    optimizer_class, options = KINDS[kind]
    if stage == 1:
        model = DistributedDataParallel(module)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class, bucket_cap_mb=cap, **options)
        return module, model, optimizer, None if synchronised else model.no_sync
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), optimizer_class, stage=2, bucket_cap_mb=cap, **options
    )
    module.first.bias.data.copy_(built(dtype).first.bias)  # frozen: no optimizer knows it
    return module, module, optimizer, None if synchronised else optimizer.no_sync


def same_as_one_process(stage, kind, dtype, accumulation, cap, synchronised):
    rank, tokens = dist.get_rank(), batches(4, accumulation, dist.get_world_size())
    alone = built(dtype)
    optimizer_class, options = KINDS[kind]
    train_alone(alone, optimizer_class(trainable(alone), **options), tokens)
    module, model, optimizer, no_sync = distributed(stage, kind, dtype, cap, synchronised)
    train(model, optimizer, tokens, rank, no_sync)
    tolerance = {
        torch.float64: dict(rtol=1e-12, atol=1e-13),
        torch.float32: dict(rtol=1e-4, atol=1e-5),
        torch.bfloat16: dict(rtol=2**-5, atol=2**-6),
    }[dtype]
    for (name, one), other in zip(alone.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    if stage == 2:
        assert all(param.grad is None for param in module.parameters())
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, [sum(p.last - p.first for p in b.pieces) for b in optimizer.buckets])
    for number, bucket in enumerate(optimizer.buckets):
        owned = [share[number] for share in shares]
        assert sum(owned) == bucket.elements
        assert max(owned) == -(-bucket.elements // len(shares))


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (1, (1, "adamw", torch.float64, 1, None, False)),
        (1, (2, "adamw", torch.float64, 2, SMALL, True)),
        (2, (1, "kernels", torch.float64, 2, SMALL, False)),
        (3, (2, "kernels", torch.float64, 2, SMALL, False)),
        (3, (1, "sgd", torch.float64, 1, SMALL, True)),
        (4, (2, "adamw", torch.float64, 3, SMALL, True)),
        (4, (1, "adamw", torch.float64, 2, None, True)),
        (2, (2, "sgd", torch.float32, 1, None, False)),
        (2, (2, "sgd", torch.bfloat16, 1, SMALL, False)),
    ],
)
def test_equals_one_process(ranks, world_size, arguments):
    ranks.run(world_size, same_as_one_process, *arguments, backend=backend_of(world_size))


@pytest.mark.proof
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_equals_one_process_whole_grid(ranks, world_size, stage):
    for kind, dtype, *rest in itertools.product(
        KINDS, (torch.float64, torch.float32, torch.bfloat16), (1, 3), (None, SMALL), (True, False)
    ):
        if dtype is torch.bfloat16 and kind != "sgd":
            continue  # Adam's first step is +-lr by the sign of a gradient that rounding may turn
        ranks.run(world_size, same_as_one_process, stage, kind, dtype, *rest)


def same_bits_as_torch():
    rank, tokens = dist.get_rank(), batches(4, 2, dist.get_world_size())
    for dtype in (torch.float32, torch.bfloat16):
        theirs = nn.parallel.DistributedDataParallel(built(dtype, rank))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sharded = TorchZero(theirs.parameters(), torch.optim.AdamW, lr=1e-2)
        train(theirs, sharded, tokens, rank, theirs.no_sync)
        for stage in (1, 2)[: 2 if dist.get_world_size() == 2 else 1]:
            module, model, optimizer, no_sync = distributed(stage, "adamw", dtype, None, False)
            train(model, optimizer, tokens, rank, no_sync)
            for a, b in zip(theirs.parameters(), module.parameters(), strict=True):
                assert torch.equal(a, b), (stage, dtype, (a - b).abs().max())


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_bits_as_torch(ranks, world_size):
    """With three ranks stage 2's order of summation is the reduce-scatter's, not the all-reduce's."""
    ranks.run(world_size, same_bits_as_torch)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 7))
@settings(deadline=None)
def test_ranges_are_even_and_cover_every_element_once(sizes, world_size):
    size = padded(sum(sizes), world_size)
    assert size % world_size == 0
    assert 0 <= size - sum(sizes) < world_size
    share, seen = size // world_size, []
    for rank in range(world_size):
        parts = cut(sizes, rank * share, (rank + 1) * share)
        assert sum(last - first for _, first, last in parts) <= share
        seen += [(index, element) for index, first, last in parts for element in range(first, last)]
    assert seen == [(index, element) for index, size in enumerate(sizes) for element in range(size)]


def groups_schedules_and_clipping(stage):
    rank, tokens = dist.get_rank(), batches(4, 1, dist.get_world_size())
    results = []
    for sharded in (False, True):
        module = built(torch.float64, 0)
        model = DistributedDataParallel(module) if sharded and stage == 1 else module
        last = list(module.last.parameters())
        seen = [module.embedding.weight, module.scale, module.first.weight]
        groups = [
            {"params": [module.embedding.weight, module.scale], "weight_decay": 0.3},
            {"params": [module.first.weight, module.first.bias], "lr": 5e-2},
        ]
        if sharded:
            optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, stage=stage, lr=1e-2)
            clip = optimizer.clip_grad_norm_
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
            clip = functools.partial(nn.utils.clip_grad_norm_, seen)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        norms = []
        for number, step in enumerate(tokens):
            if number == 2:
                optimizer.add_param_group({"params": last, "lr": 1e-3})
                seen += last
            optimizer.zero_grad()
            module.zero_grad()

            def closure(step=step, optimizer=optimizer, model=model, sharded=sharded, norms=norms, clip=clip):
                loss = loss_of(model, step[0, rank] if sharded else step[0].flatten(0, 1))
                loss.backward()
                norms.append(clip(0.1))
                return loss

            assert optimizer.step(closure).requires_grad
            if number < 2:
                schedule.step()  # torch's schedulers know the groups of their start
        results.append((list(module.parameters()), norms, [g["lr"] for g in optimizer.param_groups]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)
    assert results[0][1][0] > 0.1


@pytest.mark.parametrize("stage", [1, 2])
def test_groups_schedules_closures_and_clipping(ranks, stage):
    for world_size in (1, 3):
        ranks.run(world_size, groups_schedules_and_clipping, stage)


def saved(stage, kind, steps, state):
    """Train ``steps`` of 6 from the state given; the states after them, unsharded on the last rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module, model, optimizer, _ = distributed(stage, kind, torch.float64, SMALL, True)
    if state is not None:
        module.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    tokens = batches(6, 1, 12)[steps[0] : steps[1]]
    tokens = tokens.view(len(tokens), 1, world_size, -1, 5)
    train(model, optimizer, tokens, rank, None)
    if state is None:
        with pytest.raises(RuntimeError, match="call consolidate_state_dict"):
            optimizer.state_dict()
    optimizer.consolidate_state_dict(to=world_size - 1)
    if rank != world_size - 1:
        with pytest.raises(RuntimeError, match=f"is not on rank {rank}"):
            optimizer.state_dict()
        return None
    mine = optimizer.sharded_state_dict()["state"]
    full = optimizer.state_dict()["state"]
    for number, piece in mine.items():
        for name in set(piece) - {"first", "last", "step"}:
            assert torch.equal(piece[name], full[number][name].flatten()[piece["first"] : piece["last"]])
    return copy.deepcopy((module.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize(
    ("stage", "kind", "worlds"),
    [
        (1, "kernels", (3, 2)),
        (2, "adamw", (4, 1)),
        (1, "sgd", (1, 4)),
        (1, "adamw", (3, 2)),
        (2, "kernels", (4, 1)),
    ],
)
def test_state_is_that_of_one_process_at_any_world_size(ranks, stage, kind, worlds):
    middle = ranks.run(worlds[0], saved, stage, kind, (0, 3), None)[-1]
    end = ranks.run(worlds[1], saved, stage, kind, (3, 6), middle)[-1]
    alone = built()
    optimizer_class, options = KINDS[kind]
    plain = optimizer_class(alone.parameters(), **options)
    train_alone(alone, plain, batches(6, 1, 12))
    torch.testing.assert_close(end[0], alone.state_dict(), rtol=1e-11, atol=1e-12)
    expected = plain.state_dict()
    assert end[1]["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(end[1]["state"], expected["state"], rtol=1e-11, atol=1e-12)
    plain.load_state_dict(end[1])


def loaded_over_a_consolidated_state():
    _, model, optimizer, _ = distributed(1, "adamw", torch.float64, SMALL, True)
    tokens = batches(3, 1, 2)
    train(model, optimizer, tokens[:1], dist.get_rank(), None)
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    first = copy.deepcopy(states[0])
    train(model, optimizer, tokens[1:], dist.get_rank(), None)
    optimizer.consolidate_state_dict(to=0)
    optimizer.load_state_dict(first)
    with pytest.raises(RuntimeError, match="call consolidate_state_dict"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.testing.assert_close(optimizer.state_dict(), first, rtol=0, atol=0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    with pytest.raises(RuntimeError, match="call consolidate_state_dict"):
        optimizer.state_dict()


def test_a_consolidated_state_does_not_outlive_what_it_was_taken_of(ranks):
    ranks.run(2, loaded_over_a_consolidated_state)


def refused_states(state):
    _, _, optimizer, _ = distributed(1, "adamw", torch.float64, None, True)
    few, odd = copy.deepcopy(state), copy.deepcopy(state)
    few["param_groups"][0]["params"].pop()
    odd["state"][1]["exp_avg"] = torch.zeros(7, 5)
    messages = []
    for wrong in (few, odd):
        with pytest.raises(ValueError) as raised:
            optimizer.load_state_dict(wrong)
        messages.append(str(raised.value))
    return messages


def test_a_state_that_does_not_fit_is_refused(ranks):
    alone = built()
    plain = torch.optim.AdamW(alone.parameters())
    train_alone(alone, plain, batches(1, 1, 1))
    shapes = "exp_avg of parameter 1 has shape [7, 5] in the state; the parameter has [11, 6]"
    for messages in ranks.run(2, refused_states, plain.state_dict()):
        assert messages == ["the state has groups of [5] parameters, the optimizer of [6]", shapes]


def unused_and_accumulated():
    """Stage 2: what no rank used is not updated; gradients serve one step, whoever zeroes them."""
    rank = dist.get_rank()
    module = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]).double()
    twin = copy.deepcopy(module)
    dist.broadcast(twin[0].weight.data, 0)
    options = dict(lr=1e-1, weight_decay=0.5)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(),
        torch.optim.AdamW,
        stage=2,
        bucket_cap_mb=2e-5,
        find_unused_parameters=True,
        **options,
    )
    twin.load_state_dict(module.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), **options)
    for step in range(3):
        x = torch.arange(6.0, dtype=torch.float64).view(2, 3) + step
        module.zero_grad()  # not the optimizer's
        module[1](module[0](x[rank : rank + 1])).sum().backward() if rank else module[0](
            x[:1]
        ).sum().backward()
        optimizer.step()
        plain.zero_grad()
        (module_loss := twin[0](x[:1]).sum() + twin[1](twin[0](x[1:])).sum()).div(2).backward()
        assert module_loss.requires_grad
        plain.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    strict = ZeroRedundancyOptimizer(twin.parameters(), torch.optim.SGD, stage=2, bucket_cap_mb=2e-5, lr=0.1)
    twin[0](x).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"no gradient reached .*parameter 2 \(4 of 6 parameters\).*find_unused"
    ):
        strict.step()


def test_unused_parameters(ranks):
    ranks.run(2, unused_and_accumulated)


def joined():
    rank = dist.get_rank()
    tokens = batches(4, 1, 4)
    results = []
    for ours in (False, True):
        module = built(torch.float32, rank)
        model = DistributedDataParallel(module) if ours else nn.parallel.DistributedDataParallel(module)
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            if ours
            else torch.optim.SGD(trainable(module), lr=0.1)
        )
        with warnings.catch_warnings(), Join([model, optimizer] if ours else [model]):
            warnings.simplefilter("ignore")
            for step in range(4 - rank):
                optimizer.zero_grad()
                loss_of(model, tokens[step, 0, rank]).backward()
                optimizer.step()
        results.append(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_uneven_inputs_join(ranks):
    ranks.run(3, joined)


def refused(how):
    rank = dist.get_rank()
    module = nn.Linear(3, 3 + rank * (how == "shape"))
    if how == "stage":
        return ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, stage=3, lr=1)
    if how == "optimizer":
        return ZeroRedundancyOptimizer(module.parameters(), torch.optim.LBFGS)
    if how == "twice":
        model = DistributedDataParallel(module)
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, stage=2, lr=1)
    if how == "formula":
        return predict_memory(module.parameters(), torch.optim.LBFGS, 2)
    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=1)
    if how == "no_sync":
        with optimizer.no_sync():
            pass
    optimizer.consolidate_state_dict(to=2)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("shape", r"parameter 0 float32 \[3, 3\] on rank 0, parameter 0 float32 \[4, 3\] on rank 1"),
        ("stage", "stage is 3; it is 1"),
        ("optimizer", "LBFGS is not elementwise"),
        ("twice", "is reduced by AllReduced already"),
        ("formula", "the state of LBFGS is not known"),
        ("no_sync", "in stage 1 gradients are DistributedDataParallel's"),
        ("to", "to is 2; the group has ranks 0 to 1"),
    ],
)
def test_what_is_wrong_is_said_on_every_rank(ranks, how, error):
    with pytest.raises(AssertionError, match=f"ValueError: .*{error}") as raised:
        ranks.run(2, refused, how)
    assert all(f"rank {rank} of 2: ValueError" in str(raised.value) for rank in (0, 1))


def counted(stage, accumulation, synchronised):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = batches(3, accumulation, world_size)
    module, model, optimizer, no_sync = distributed(stage, "adamw", torch.float32, SMALL, synchronised)
    train(model, optimizer, tokens[:2], rank, no_sync)
    with link.counted() as traffic:
        train(model, optimizer, tokens[2:], rank, no_sync)
    backwards = accumulation if synchronised else 1
    predicted = predict_communication(module.parameters(), world_size, stage, backwards, SMALL)
    if stage == 1:
        averaging = predict_averaging(module, world_size=world_size)
        predicted |= {name: backwards * size for name, size in averaging.items()}
    assert dict(traffic.payload) == predicted
    assert traffic.calls["all_gather"] == len(optimizer.buckets)


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (3, (1, 2, False)),
        (3, (1, 2, True)),
        (3, (2, 2, True)),
        (3, (2, 3, False)),
        (1, (1, 1, True)),
        (1, (2, 2, True)),
    ],
)
def test_communication_is_as_predicted(ranks, world_size, arguments):
    ranks.run(world_size, counted, *arguments, backend="link")


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"amsgrad": True}),
    (kernels.AdamW, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {}),
]


def held():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = batches(1, 1, world_size)[0, 0, rank]
    for stage, (optimizer_class, options) in itertools.product((1, 2), OPTIMIZERS):
        module = built(torch.float32)
        model = DistributedDataParallel(module) if stage == 1 else module
        optimizer = ZeroRedundancyOptimizer(
            module.parameters(), optimizer_class, stage=stage, bucket_cap_mb=SMALL, **options
        )
        loss_of(model, tokens).backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if stage == 2:
            assert not gradients
            gradients = [bucket.gradient for bucket in optimizer.buckets]
        gradient_bytes = memory_held.held_bytes(gradients)
        optimizer.step()
        state = [v for s in optimizer.optim.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        found = memory_held.Memory(
            parameters=memory_held.held_bytes(module.parameters()),
            gradients=gradient_bytes,
            optimizer=memory_held.held_bytes(state),
            buffers=memory_held.held_bytes(optimizer.reducer.buffers) if stage == 2 else 0,
        )
        predicted = predict_memory(
            module.parameters(), optimizer_class, world_size, rank, stage, SMALL, **options
        )
        assert found == predicted, (stage, optimizer_class, found, predicted)


def test_memory_is_as_predicted(ranks):
    ranks.run(3, held)


def peak(stage):
    """Bytes held between steps, and how many more a step needs at its peak."""
    layers, width = 16, 64
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    one = width * width * 4
    options = dict(lr=0.1, momentum=0.9)
    cap = 2 * one / 2**20  # two layers a bucket
    predicted = predict_memory(
        module.parameters(), torch.optim.SGD, dist.get_world_size(), dist.get_rank(), stage, cap, **options
    )
    x = torch.ones(1, width)
    model = DistributedDataParallel(module, bucket_cap_mb=cap) if stage == 1 else module
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.SGD, stage=stage, bucket_cap_mb=cap, **options
    )

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with memory.tracked() as tracker:
        step()
    loss = model(x).sum()
    with memory.tracked() as backward:
        loss.backward()
    state = [v for s in optimizer.optim.state.values() for v in s.values()]
    gradients = model.reducer.flats if stage == 1 else [bucket.gradient for bucket in optimizer.buckets]
    buffers = [] if stage == 1 else optimizer.reducer.buffers
    held = memory_held.held_bytes([*module.parameters(), *state, *gradients, *buffers])
    return held, tracker.peak_bytes, backward.peak_bytes, predicted.total, one


def test_peak_memory_is_as_predicted(ranks):
    """Above what is held a step needs in stage 1 a gradient on its way, in stage 2 those of a bucket of two.

    Over shared memory, where nothing else is torch's: gloo copies what it gathers and scatters, and its
    threads free it late.
    """
    for stage, above in ((1, 1), (2, 2)):
        for held, step, backward, predicted, one in ranks.run(2, peak, stage, backend="shm"):
            assert held == predicted
            assert step == pytest.approx(above * one, abs=0.01 * predicted)
            if stage == 1:
                assert backward == pytest.approx(one, abs=0.01 * predicted)
