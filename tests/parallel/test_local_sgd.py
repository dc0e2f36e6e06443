"""Local SGD and DiLoCo equal ranks that are simulated one after the other in one process."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import checkpoint, link
from parallel.local_sgd import (
    DiLoCo,
    LocalSGD,
    average,
    average_gradients,
    average_one_by_one,
    predict_communication,
)

STEPS = 7


class Model(nn.Module):
    """Tied weights, a frozen layer, a parameter that gets no gradient, sizes that nothing divides."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.frozen = nn.Linear(7, 7, dtype=dtype).requires_grad_(False)
        self.last = nn.Linear(7, 5, bias=False, dtype=dtype)
        self.again = nn.Linear(7, 5, bias=False, dtype=dtype)
        self.again.weight = self.last.weight
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, x):
        x = self.frozen(torch.tanh(self.first(x)))
        return self.last(x) + self.again(x.square())


def batch(rank, step, half, dtype):
    return torch.randn(
        3, 5, generator=torch.Generator().manual_seed(100 * rank + 10 * step + half), dtype=torch.float64
    ).to(dtype)


def backward(model, rank, step, dtype):
    """Two batches accumulated."""
    for half in range(2):
        x = batch(rank, step, half, dtype)
        ((model(x) - x).square().mean() / 2).backward()


def inner(model, name):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.05) if name == "adamw" else torch.optim.SGD(parameters, lr=0.1)


def simulated(world_size, dtype, name, every, warmup, outer):
    """The same training in one process, all ranks in a loop: the definition, in plain words."""
    torch.manual_seed(1)
    first = Model(dtype)
    models = [copy.deepcopy(first) for _ in range(world_size)]
    optimizers = [inner(model, name) for model in models]
    start = [p.detach().clone().requires_grad_() for p in first.parameters() if p.requires_grad]
    outer_step = torch.optim.SGD(start, **outer) if outer else None
    for step in range(1, STEPS + 1):
        for rank, model in enumerate(models):
            optimizers[rank].zero_grad()
            backward(model, rank, step, dtype)
        columns = list(zip(*([p for p in m.parameters() if p.requires_grad] for m in models), strict=True))
        if step <= warmup:
            for column in columns:
                if column[0].grad is not None:
                    mean = sum(p.grad for p in column) / world_size
                    for p in column:
                        p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            if step == warmup:
                for s, column in zip(start, columns, strict=True):
                    s.copy_(column[0])
            if step > warmup and (step - warmup) % every == 0:
                means = [sum(column) / world_size for column in columns]
                if outer_step:
                    for s, mean in zip(start, means, strict=True):
                        s.grad = s - mean
                    outer_step.step()
                    means = start
                for column, mean in zip(columns, means, strict=True):
                    for p in column:
                        p.copy_(mean)
    return [[p.detach() for p in model.parameters()] for model in models]


NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
CASES = [
    ("sgd", 1, 0, None),
    ("sgd", 3, 0, None),
    ("adamw", 2, 3, None),
    ("adamw", 3, 0, NESTEROV),
    ("adamw", 2, 3, NESTEROV),
]


def trained(dtype, name, every, warmup, outer, group=None):
    torch.manual_seed(1 + dist.get_rank())  # construction gives all ranks rank 0's
    model = Model(dtype)
    kind = DiLoCo if outer else LocalSGD
    optimizer = kind(model, inner(model, name), every, warmup, group)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        backward(model, dist.get_rank(group), step, dtype)
        with link.counted() as traffic:
            optimizer.step()
        ranks = dist.get_world_size(group)
        assert traffic.payload == predict_communication(model, step, every, warmup, world_size=ranks), step
    return model


def equals_the_simulation(cases, dtype, tolerance):
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for name, every, warmup, outer in cases:
        expected = simulated(world_size, dtype, name, every, warmup, outer)[rank]
        model = trained(dtype, name, every, warmup, outer)
        for found, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)
        assert model.unused.grad is None
        assert model.again.weight is model.last.weight


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_variant_equals_the_simulation_and_its_bytes_the_prediction(ranks, world_size):
    ranks.run(world_size, equals_the_simulation, CASES, torch.float64, 1e-12, backend="link")


def test_single_precision_equals_the_simulation(ranks):
    ranks.run(2, equals_the_simulation, CASES, torch.float32, 1e-5, backend="link")


def sixteen_bits():
    rank = dist.get_rank()
    value = torch.tensor([256.0, 1.0, 3.0][rank], dtype=torch.bfloat16)
    (mean,) = average([value])
    model = trained(torch.bfloat16, "sgd", 1, 0, None)
    start = DiLoCo(model, inner(model, "sgd"), 1).start
    return mean.item(), mean.dtype, [s.dtype for s in start], [p.dtype for p in model.parameters()]


def test_sixteen_bits_are_summed_in_thirty_two(ranks):
    """256 + 1 is 256 in bfloat16; the mean of 256, 1 and 3 is 86.67."""
    for mean, dtype, start, parameters in ranks.run(3, sixteen_bits, backend="link"):
        assert mean == torch.tensor(260.0).div(3).item()
        assert dtype is torch.float32
        assert set(start) == {torch.float32}
        assert set(parameters) == {torch.bfloat16}


def beside_pytorch():
    """The averager cannot average a parameter that has no gradient, so the model has none such."""
    # Imported here: it costs a second, and warns of TorchScript's end.
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    torch.manual_seed(1)
    ours, theirs = nn.Linear(5, 5), nn.Linear(5, 5)
    theirs.load_state_dict(ours.state_dict())
    mine = LocalSGD(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), every=4)
    theirs.load_state_dict(ours.state_dict())
    averager = PeriodicModelAverager(period=4, warmup_steps=3)
    peer = PostLocalSGDOptimizer(torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), averager)
    for step in range(8):
        for model, optimizer in [(ours, mine), (theirs, peer)]:
            optimizer.zero_grad()
            backward(model, dist.get_rank(), step, torch.float32)
            optimizer.step()
        if step == 3:  # the peer averages first at step 3 (its count begins with 0), we at the fourth step
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    return torch.equal(ours.weight, theirs.weight)


def test_it_equals_pytorchs_post_local_sgd_bit_for_bit(ranks):
    assert ranks.run(2, beside_pytorch) == [True, True]


def average_is_the_naive_one(sizes):
    tensors = [
        torch.randn(size, dtype=dtype) + dist.get_rank()
        for size in sizes
        for dtype in (torch.float32, torch.float64)
    ]
    with link.counted() as flat:
        together = average(tensors)
    with link.counted() as naive:
        apart = average_one_by_one(tensors)
    torch.testing.assert_close(together, apart)
    return flat.payload == naive.payload, flat.calls["all_reduce"], naive.calls["all_reduce"]


def test_one_collective_a_dtype_moves_the_same_bytes(ranks):
    assert ranks.run(3, average_is_the_naive_one, [(3, 2), (5,), ()], backend="link") == [(True, 2, 6)] * 3


def gradients_of_some():
    rank = dist.get_rank()
    nobody, one = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    if rank == 1:
        one.grad = torch.full((2,), 3.0)
    average_gradients([nobody, one])
    return nobody.grad, one.grad.tolist()


def test_a_gradient_that_one_rank_lacks_counts_as_zero(ranks):
    assert ranks.run(3, gradients_of_some) == [(None, [1.0, 1.0])] * 3


def in_a_sub_group():
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    model = trained(torch.float64, "adamw", 2, 1, NESTEROV, mine)
    expected = simulated(2, torch.float64, "adamw", 2, 1, NESTEROV) if dist.get_rank() % 2 == 0 else None
    if expected:  # the other group begins with another rank's parameters
        for found, right in zip(model.parameters(), expected[dist.get_rank(mine)], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_sub_group_is_a_world_of_its_own(ranks):
    ranks.run(4, in_a_sub_group, backend="link")


def interrupted(folder):
    """Saved between two averagings and taken up again: the end is the same, bit for bit."""

    def state_of(model, optimizer):
        return {
            "model": checkpoint.PerRank(model),
            "inner": checkpoint.PerRank(optimizer.optimizer),
            "outer": optimizer,
        }

    def made():
        torch.manual_seed(1)
        model = Model(torch.float32)
        return model, DiLoCo(model, inner(model, "adamw"), 3)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            backward(model, dist.get_rank(), step, torch.float32)
            optimizer.step()

    model, optimizer = made()
    go(model, optimizer, range(1, 5))
    checkpoint.save(folder, 4, state_of(model, optimizer))
    go(model, optimizer, range(5, 10))
    again, resumed = made()
    go(again, resumed, range(50, 52))  # something else stands there
    step = checkpoint.load(folder, state_of(again, resumed))
    go(again, resumed, range(step + 1, 10))
    return [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]


def test_it_resumes_between_two_averagings(ranks, tmp_path):
    assert all(map(all, ranks.run(2, interrupted, str(tmp_path))))


def synchronised_once_more(kind):
    """Behind a round, behind a step alone, again, in the warm-up: (bytes communicated, did it move?)."""
    torch.manual_seed(1)
    model = Model(torch.float64)
    optimizer = kind(model, inner(model, "adamw"), 2, 1)
    found = []

    def synchronised():
        before = [p.detach().clone() for p in model.parameters()]
        with link.counted() as traffic:
            optimizer.synchronize()
        moved = not all(map(torch.equal, before, model.parameters()))
        found.append((sum(traffic.payload.values()) > 0, moved))

    for step in range(1, 5):  # the first is warm-up, a round ends with the third
        optimizer.zero_grad()
        backward(model, dist.get_rank(), step, torch.float64)
        optimizer.step()
        if step != 2:
            synchronised()
    again = Model(torch.float64)
    resumed = kind(again, inner(again, "adamw"), 2, 1)
    synchronised()
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.apart  # the state says so, where the number of steps alone would not
    return found


def test_ranks_that_agree_are_left_as_they_are(ranks):
    """Else DiLoCo's outer momentum alone would move them."""
    nothing, agreed = (False, False), (True, True)
    for kind in (LocalSGD, DiLoCo):
        for found in ranks.run(2, synchronised_once_more, kind, backend="link"):
            assert found == [nothing, nothing, agreed, nothing], kind


def disagreements():
    rank, found = dist.get_rank(), []
    for model, every in [
        (nn.Linear(3, 2 + rank), 2),
        (nn.Linear(3, 2, bias=bool(rank)), 2),
        (nn.Linear(3, 2), 2 + rank),
    ]:
        try:
            LocalSGD(model, torch.optim.SGD(model.parameters()), every)
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_that_disagree_are_told_on_all(ranks):
    first, second = ranks.run(2, disagreements)
    assert first == second
    for text, message in zip(
        first,
        [
            r"weight float32 \[2, 3\] on rank 0, weight float32 \[3, 3\] on rank 1",
            r"nothing more on rank 0, bias float32 \[2\] on rank 1",
            r"every=2, warmup=0 on rank 0, every=3, warmup=0 on rank 1",
        ],
        strict=True,
    ):
        assert re.search(message, text), text


@pytest.mark.parametrize(("every", "warmup"), [(0, 0), (1, -1)])
def test_settings_are_checked(every, warmup):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"not {every} and {warmup}"):
        LocalSGD(model, torch.optim.SGD(model.parameters()), every, warmup)
