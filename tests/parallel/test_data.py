"""DistributedDataParallel against one process and against PyTorch's, to the last bit where possible."""

import contextlib
import itertools
import warnings
from datetime import timedelta

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from ranks import backend_of
from torch import nn

from parallel import buckets, link, memory, memory_held
from parallel.data import DistributedDataParallel, predict_communication, predict_memory
from parallel.same_module import broadcast_from

SMALL = 2e-4  # MiB of a bucket, so that a small model has several


class Model(nn.Module):
    """Tied weights, a frozen parameter, sizes no world size divides, a buffer that forward changes."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.first.bias.requires_grad_(False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens):
        self.seen += 1
        hidden = torch.tanh(self.norm(self.first(self.embedding(tokens))))
        return self.head(self.last(hidden))


class Branches(nn.Module):
    """Only the branch that is asked for is used; ``never`` never is."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.branches = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        self.never = nn.Linear(2, 2)

    def forward(self, x, branch):
        return {"out": self.branches[branch](self.stem(x)), "unused": self.stem(x)}


def loss_of(model, tokens):
    logits = model(tokens).flatten(0, 1)
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens.flatten()
    )


def batches(steps, accumulation, size=4):
    """tokens (steps, accumulation, world, size, 5), the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    shape = steps, accumulation, dist.get_world_size(), size, 5
    return torch.randint(0, 11, shape, generator=generator)


def built(dtype, seed, tied=True):
    torch.manual_seed(seed)
    return Model(tied).to(dtype)


def optimized(model, kind):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def train(model, optimizer, tokens, rank, set_to_none=True):
    """Steps on this rank's batches, all but the last of a step in no_sync; the gradients of each step."""
    gradients = []
    for step in tokens:
        optimizer.zero_grad(set_to_none)
        for number, micro in enumerate(step):
            last = number == len(step) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                (loss_of(model, micro[rank]) / len(step)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return gradients


def train_alone(model, optimizer, tokens):
    for step in tokens:
        optimizer.zero_grad()
        for micro in step:
            (loss_of(model, micro.flatten(0, 1)) / len(step)).backward()
        optimizer.step()


def same_as_one_process(dtype, tied, accumulation, as_view, cap, kind, set_to_none):
    tokens = batches(4, accumulation)
    rank = dist.get_rank()
    alone = built(dtype, 0, tied)
    train_alone(alone, optimized(alone, kind), tokens)
    ours = DistributedDataParallel(
        built(dtype, rank, tied), bucket_cap_mb=cap, gradient_as_bucket_view=as_view
    )
    train(ours, optimized(ours, kind), tokens, rank, set_to_none)
    tolerance = {
        torch.float64: dict(rtol=1e-12, atol=1e-13),
        torch.float32: dict(rtol=1e-4, atol=1e-5),
        torch.bfloat16: dict(rtol=2**-5, atol=2**-6),
    }[dtype]
    for (name, one), other in zip(alone.named_parameters(), ours.module.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    assert ours.module.last.weight.grad is not None
    assert ours.module.first.bias.grad is None
    # A bucket ends with the gradient that fills it; the embedding's comes last.
    before = sum(each.nbytes for each in list(ours.parameters())[1:] if each.requires_grad)
    assert (len(ours.reducer.buckets) == 1) == (cap is None or before < cap * 2**20)
    assert ours.module.seen.tolist() == [4.0 * accumulation] * 3
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [p.detach() for p in ours.parameters()])
    assert all(torch.equal(a, b) for other in everybody for a, b in zip(other, everybody[0], strict=True))


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (1, (torch.float64, True, 1, True, None, "adamw", True)),
        (2, (torch.float64, True, 2, True, SMALL, "sgd", True)),
        (3, (torch.float64, True, 1, False, SMALL, "adamw", True)),
        (4, (torch.float64, False, 3, True, SMALL, "adamw", False)),
        (2, (torch.float32, True, 2, False, SMALL, "sgd", False)),
        (2, (torch.bfloat16, True, 1, True, SMALL, "sgd", True)),
    ],
)
def test_equals_one_process(ranks, world_size, arguments):
    ranks.run(world_size, same_as_one_process, *arguments, backend=backend_of(world_size))


@pytest.mark.proof
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_one_process_whole_grid(ranks, world_size, dtype):
    for rest in itertools.product(
        (True, False), (1, 3), (True, False), (None, SMALL), ("sgd", "adamw"), (True, False)
    ):
        if dtype is torch.bfloat16 and rest[4] == "adamw":
            continue  # its first step is +-lr by the sign of a gradient that rounding may turn
        ranks.run(world_size, same_as_one_process, dtype, *rest)


def same_bits_as_torch(dtype, accumulation, as_view, cap, set_to_none):
    tokens, rank = batches(4, accumulation), dist.get_rank()
    results = []
    for wrap in (DistributedDataParallel, nn.parallel.DistributedDataParallel):
        model = wrap(built(dtype, rank), bucket_cap_mb=cap, gradient_as_bucket_view=as_view)
        gradients = train(model, optimized(model, "adamw"), tokens, rank, set_to_none)
        results.append((gradients, list(model.state_dict().items())))
    (ours, our_state), (theirs, their_state) = results
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for index, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert torch.equal(a, b), (step, index, (a - b).abs().max())
    assert [name for name, _ in our_state] == [name for name, _ in their_state]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(our_state, their_state, strict=True))


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (2, (torch.float32, 2, True, SMALL, True)),
        (3, (torch.float32, 1, True, None, True)),
        (4, (torch.float32, 2, False, None, False)),
        (2, (torch.bfloat16, 1, False, SMALL, False)),
        (3, (torch.bfloat16, 2, True, None, True)),
    ],
)
def test_same_bits_as_torch(ranks, world_size, arguments):
    ranks.run(world_size, same_bits_as_torch, *arguments)


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        min_size=1,
    ),
    st.integers(1, 300),
    st.integers(1, 300),
)
@settings(deadline=None, max_examples=80)
def test_buckets_are_those_of_torch(shapes, first, cap):
    tensors = [torch.empty(size, dtype=dtype) for size, dtype in shapes]
    theirs, _ = dist._compute_bucket_assignment_by_size(tensors, [first, cap])
    assert buckets.assign(tensors, first, cap) == theirs


class Backwards(nn.Module):
    """Registered in the reverse order of use, in two dtypes."""

    def __init__(self):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x).double()).float())


def order_and_overlap():
    torch.manual_seed(dist.get_rank())
    ours = DistributedDataParallel(Backwards(), bucket_cap_mb=6e-5)
    names = lambda: [[slot.name for slot in bucket.slots] for bucket in ours.reducer.buckets]  # noqa: E731
    assert names()[0] == ["a.weight"] or names()[0] == ["a.bias"]
    launched = {}
    for name, param in ours.module.named_parameters():
        param.register_post_accumulate_grad_hook(
            lambda _, name=name: launched.__setitem__(name, ours.reducer._next)
        )
    for _ in range(2):
        ours(torch.ones(2, 4)).sum().backward()
    assert names()[0][0].startswith("c.")
    assert names()[-1][-1].startswith("a.")
    assert all(len({slot.param.dtype for slot in bucket.slots}) == 1 for bucket in ours.reducer.buckets)
    # When the first layer's gradients come, those of the last are on their way.
    assert 1 <= launched["c.weight"] < launched["b.weight"]
    for bucket, flat in zip(ours.reducer.buckets, ours.reducer.flats, strict=True):
        for slot in bucket.slots:
            assert slot.param.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    return names(), [p.grad for p in ours.parameters()]


def test_buckets_follow_the_order_of_backward_and_overlap_it(ranks):
    first, second = ranks.run(2, order_and_overlap)
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def unused_parameters():
    rank, grads = dist.get_rank(), []
    for wrap in (DistributedDataParallel, nn.parallel.DistributedDataParallel):
        torch.manual_seed(rank)
        model = wrap(
            Branches(), find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=3e-5
        )
        mine = []
        for step in range(4):
            model.zero_grad(set_to_none=step < 2)
            x = torch.full((2, 3), 1.0 + rank + step)
            branch = rank if step % 2 else 0  # both on some rank, or only the first
            with model.no_sync() if step == 2 else contextlib.nullcontext():
                model(x, branch)["out"].square().sum().backward()
            mine.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        grads.append(mine)
    for ours, theirs in zip(*grads, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert [grad is None for grad in (grads[0][0][-1], grads[0][0][4], grads[0][1][4])] == [True, True, False]
    torch.manual_seed(0)
    strict = DistributedDataParallel(Branches())
    with pytest.raises(RuntimeError, match=r"branches.1.weight, branches.1.bias, never.weight.*find_unused"):
        strict(torch.ones(1, 3), 0)["out"].sum().backward()
    inner = torch.ones(1, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(strict(inner, 0)["out"].sum(), inner)  # for no parameter: nothing to miss
    return slope.abs().sum().item() > 0


def test_unused_parameters_as_in_torch_or_named(ranks):
    assert ranks.run(2, unused_parameters) == [True, True]


def differing(how):
    rank = dist.get_rank()
    group = dist.new_group()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    if how == "shape":
        model = nn.Sequential(nn.Linear(3, 3 + rank), nn.Linear(3 + rank, 2))
    elif how == "number":
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + rank)])
    elif how == "frozen":
        model[1].bias.requires_grad_(rank == 0)
    elif how == "sparse":
        model = nn.Embedding(3, 3, sparse=True)
    elif how == "all frozen":
        model.requires_grad_(False)
    elif how == "cap":
        return DistributedDataParallel(model, bucket_cap_mb=0)
    elif how == "device":
        return DistributedDataParallel(model, device_ids=["meta"])
    elif how == "create_graph":
        return DistributedDataParallel(model)(torch.ones(1, 3)).square().sum().backward(create_graph=True)
    elif how == "batches":
        ours = DistributedDataParallel(model, process_group=group)
        group.set_timeout(timedelta(seconds=1))
        for _ in range(2 - rank):
            ours(torch.ones(1, 3)).sum().backward()
        if rank == 1:
            with contextlib.suppress(RuntimeError):
                dist.monitored_barrier(timeout=timedelta(seconds=5))
            raise RuntimeError("gradient bucket")
    return DistributedDataParallel(model, process_group=group)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        (
            "shape",
            r"ValueError: parameters and .* differ .*: 0.weight .*\[3, 3\] on rank 0, .*\[4, 3\] on rank 1",
        ),
        ("number", r"ValueError: .*: nothing more on rank 0, 1.weight float32 \[3, 3\] on rank 1"),
        (
            "frozen",
            r"ValueError: .*1.bias float32 \[2\] on rank 0, 1.bias float32 \[2\] \(frozen\) on rank 1",
        ),
        ("sparse", "ValueError: .*sparse=False"),
        ("all frozen", "ValueError: no parameter of the module requires a gradient"),
        ("cap", "ValueError: bucket_cap_mb is 0"),
        ("device", "ValueError: device_ids is .*the module is on cpu"),
        ("create_graph", "RuntimeError: the gradient of 1.* has a graph of its own"),
        (
            "batches",
            "RuntimeError: rank 0 of 2 waited in vain .* the order of rank 0's gradients.*fewer batches",
        ),
    ],
)
def test_what_is_wrong_is_said_on_every_rank(ranks, how, error):
    with pytest.raises(AssertionError, match=error) as raised:
        ranks.run(2, differing, how, timeout=20)
    assert all(f"rank {rank} of 2" in str(raised.value) for rank in (0, 1))


def joined(wrap, divide, accumulation=1):
    rank = dist.get_rank()
    model = wrap(built(torch.float32, rank), gradient_as_bucket_view=True, bucket_cap_mb=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    tokens = batches(5, 1)
    with model.join(divide_by_initial_world_size=divide):
        for step in range((3, 5, 1, 0)[rank]):
            optimizer.zero_grad()
            loss_of(model, tokens[step, 0, rank]).backward()
            optimizer.step()
    return list(model.module.state_dict().values())


def uneven():
    for divide in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = joined(DistributedDataParallel, divide)
            theirs = joined(nn.parallel.DistributedDataParallel, divide)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model = DistributedDataParallel(built(torch.float32, 0))
    try:
        with model.join(throw_on_early_termination=True):
            for step in range(1 + dist.get_rank()):
                loss_of(model, batches(2, 1)[step, 0, 0]).backward()
    except RuntimeError as error:
        return str(error)


def test_uneven_inputs_join_as_in_torch(ranks):
    for world_size in (2, 4):
        messages = ranks.run(world_size, uneven, backend=backend_of(world_size))
        assert messages[0] == "Rank 0 exhausted all inputs."
        assert set(messages[1:]) == {
            "Detected at least one rank that exhausted inputs. Throwing across all ranks."
        }


def ways_to_use():
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    torch.manual_seed(rank)
    ours = DistributedDataParallel(nn.Linear(3, 2), process_group=group, device_ids=["cpu"])
    start = ours.module.weight.detach().clone()
    # Gradient penalty: an inner gradient by autograd.grad, then one backward.
    x = torch.full((4, 3), 1.0 + rank, requires_grad=True)
    out = ours(x).square().sum()
    (inner,) = torch.autograd.grad(out, x, create_graph=True)
    (out + inner.square().sum()).backward()
    penalty = ours.module.weight.grad.clone()
    # An evaluation between forward and backward; two backwards of one forward add up.
    ours.zero_grad()
    out = ours(x.detach()).sum()
    with torch.no_grad():
        ours(x)
    out.backward(retain_graph=True)
    once = ours.module.weight.grad.clone()
    out.backward()
    twice = ours.module.weight.grad.clone()
    # Wrapped again, gradients are averaged once; state passes through "module.".
    again = DistributedDataParallel(ours.module, process_group=group)
    again.load_state_dict(ours.state_dict())
    again.zero_grad()
    again(x.detach()).sum().backward()
    wrapped = again.module.weight.grad.clone()
    # checkpointed, both ways
    deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    check = DistributedDataParallel(Checkpointed(deep), process_group=group, bucket_cap_mb=2e-5)
    grads = []
    for reentrant in (True, False):
        check.zero_grad()
        check(x.detach().requires_grad_(), reentrant).sum().backward()
        grads.append(deep[0].weight.grad.clone())
    assert torch.equal(*grads)
    return start, penalty, once, twice, wrapped, deep[0].weight.grad


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.after = inner, nn.Linear(3, 2)

    def forward(self, x, reentrant):
        return self.after(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant))


def test_sub_groups_penalties_evaluations_checkpoints_and_rewrapping(ranks):
    results = ranks.run(4, ways_to_use)
    for pair in (0, 2):
        for a, b in zip(results[pair], results[pair + 1], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(results[0][0], results[2][0])
    for pair, inputs in ((0, (1.0, 2.0)), (2, (3.0, 4.0))):
        start, penalty, once, twice, wrapped, _ = results[pair]
        torch.testing.assert_close(once, torch.full((2, 3), 4 * sum(inputs) / 2))
        torch.testing.assert_close(twice, 2 * once)
        assert torch.equal(wrapped, once)
        expected = []
        for value in inputs:
            x, weight = torch.full((4, 3), value, requires_grad=True), start.clone().requires_grad_()
            torch.manual_seed(pair)
            bias = nn.Linear(3, 2).bias
            out = nn.functional.linear(x, weight, bias).square().sum()
            (inner,) = torch.autograd.grad(out, x, create_graph=True)
            expected.append(torch.autograd.grad(out + inner.square().sum(), weight)[0])
        torch.testing.assert_close(penalty, sum(expected) / 2)


def channels_last_and_mixed():
    """Strided parameters, float64 beside bfloat16, an output in a dataclass-free tuple."""
    rank, results = dist.get_rank(), []
    for wrap in (DistributedDataParallel, nn.parallel.DistributedDataParallel):
        torch.manual_seed(rank)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        model = wrap(
            nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), Cast(16)), gradient_as_bucket_view=True
        )
        for step in range(3):
            model.zero_grad()
            model(torch.full((2, 3, 4, 4), 1.0 + rank + step) * torch.arange(4)).sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


class Cast(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.low = nn.Linear(features, 3).bfloat16()
        self.high = nn.Linear(3, 1).double()

    def forward(self, x):
        return self.high(self.low(x.bfloat16()).double())


def test_strides_and_mixed_dtypes(ranks):
    ranks.run(2, channels_last_and_mixed)


def counted(accumulation, find_unused, as_view):
    tokens, rank = batches(4, accumulation), dist.get_rank()
    ours = DistributedDataParallel(
        built(torch.float32, rank),
        bucket_cap_mb=SMALL,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=as_view,
    )
    optimizer = optimized(ours, "sgd")
    train(ours, optimizer, tokens[:2], rank)  # the buckets have settled
    with link.counted() as traffic:
        train(ours, optimizer, tokens[2:3], rank)
    predicted = predict_communication(
        ours.module, find_unused_parameters=find_unused, world_size=dist.get_world_size()
    )
    assert dict(traffic.payload) == predicted
    assert traffic.calls["all_reduce"] == len(ours.reducer.buckets) + find_unused
    held = memory_held.held_bytes(
        [*ours.parameters(), *ours.buffers(), *ours.reducer.flats]
        + [p.grad for p in ours.parameters() if p.grad is not None]
    )
    assert held == predict_memory(ours.module, as_view).total


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [(2, (1, False, True)), (2, (3, False, False)), (2, (2, True, True)), (1, (1, True, True))],
)
def test_bytes_are_as_predicted(ranks, world_size, arguments):
    ranks.run(world_size, counted, *arguments, backend="link")


def peak():
    """What the first steps need above the wrapped module, which has its buckets; they are laid anew once."""
    module = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(20)])
    model, x = DistributedDataParallel(module), torch.ones(1, 64)
    before = model.reducer.buckets
    with memory.tracked() as tracker:
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
    assert model.reducer.buckets is not before
    return tracker.peak_bytes, tracker.live_bytes, predict_memory(module).total


def test_peak_memory_is_one_gradient_above_what_is_held(ranks):
    for most, live, held in ranks.run(2, peak):
        assert abs(live) <= 0.01 * held
        assert abs(most - 64 * 64 * 4) <= 0.01 * held


def wide():
    """More than a call of broadcast takes; the bytes are counted."""
    torch.manual_seed(dist.get_rank())
    tensors = [
        torch.randn(2**22),
        torch.randn(2**20, dtype=torch.float64),
        torch.randint(9, (3,)),
        torch.randn(2**23),
    ]
    with link.counted() as traffic:
        broadcast_from(1, tensors)
    assert dict(traffic.payload) == {"broadcast": sum(map(buckets.bytes_of, tensors))}
    assert traffic.calls["broadcast"] == 2
    return [tensor.double().sum() for tensor in tensors]


def test_large_modules_are_broadcast_in_parts(ranks):
    first, second = ranks.run(2, wide, backend="link")
    assert first == second
