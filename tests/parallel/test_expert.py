"""A mixture of experts over ranks equals the dense loop, moves what it predicts, counts what it drops."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import expert, expert_state
from parallel.expert import MixtureOfExperts
from parallel.expert_state import average_gradients, full_state_dict
from parallel.mixture import DenseMixtureOfExperts
from parallel.routing import capacity, importance_loss, load_balancing_loss, route

WIDTH = 12


def dense(experts, top_k, factor, dtype):
    torch.manual_seed(5)
    layers = [
        nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH, bias=False))
        for _ in range(experts)
    ]
    mixture = DenseMixtureOfExperts(nn.Linear(WIDTH, experts, bias=False), layers, top_k, factor)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), mixture).to(dtype)


def tokens_of(rank, step, counts, dtype):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(counts[rank], WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def trains_as_one(experts, top_k, factor, counts, dtype, frozen):
    """Largest distance of losses, gradients and parameters from the dense mixture that sees all ranks'
    tokens.

    Capacity is of one rank's tokens, so the dense mixture sees them rank by rank; the loss that balances is
    of all tokens together (where the capacity is not what is compared).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = dense(experts, top_k, factor, dtype)
    for name in frozen:
        alone.get_submodule(name).requires_grad_(False)
    model = copy.deepcopy(alone)
    model[1] = MixtureOfExperts.from_dense(model[1])
    optimizers = [torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (alone, model)]
    worst, report = 0.0, []
    for step in range(6):
        parts = [tokens_of(r, step, counts, dtype) for r in range(world)]
        outputs, dropped, kept = [], 0, torch.zeros(experts, dtype=torch.int64)
        for part in parts:
            outputs.append(alone(part))
            dropped += alone[1].load.dropped
            kept += torch.tensor(alone[1].load.kept)
        everything = torch.cat(parts)
        alone(everything)
        auxiliary = alone[1].auxiliary_loss
        wanted = alone[1].load.wanted
        loss = sum(output.square().sum() for output in outputs) / world + 0.1 * auxiliary
        output = model(parts[rank])
        mine = output.square().sum() + 0.1 * model[1].auxiliary_loss
        load = model[1].load
        assert (load.tokens, load.wanted) == (sum(counts[:world]), wanted)
        assert (load.dropped, load.kept) == (dropped, tuple(kept.tolist()))
        report.append(dropped)
        if output.numel():
            worst = max(worst, distance(output, outputs[rank]))
        loss.backward()
        mine.backward()
        if step % 2:
            average_gradients(model)
            for name, parameter in model.named_parameters():
                wanted_grad = dict(alone.named_parameters())[name].grad
                assert (parameter.grad is None) == (wanted_grad is None), name
                if wanted_grad is not None:
                    worst = max(worst, distance(parameter.grad, wanted_grad))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    whole = full_state_dict(model)
    assert whole.keys() == alone.state_dict().keys()
    return max(worst, *(distance(whole[n], t) for n, t in alone.state_dict().items())), report


def distance(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-3))


def many(cases):
    return [trains_as_one(*case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_equals_the_dense_loop(ranks, world):
    uneven = (7, 0, 13, 4)
    cases = [
        (4, 2, None, (9, 9, 9, 9), torch.float64, ()),
        (7, 1, None, uneven, torch.float64, ()),
        (5, 3, 0.6, uneven, torch.float64, ()),
        (6, 2, 1.0, (8, 5, 8, 3), torch.float64, ("1.router",)),
        (5, 2, None, (6, 5, 4, 3), torch.float64, ("0", "1.experts")),
        (4, 2, 1.25, (9, 9, 9, 9), torch.float32, ()),
    ]
    for results in ranks.run(world, many, cases):
        for case, (worst, dropped) in zip(cases, results, strict=True):
            assert worst < {torch.float64: 1e-12, torch.float32: 1e-5}[case[4]], (case, worst)
            assert (sum(dropped) > 0) == (case[2] is not None), (case, dropped)


def moves_what_is_predicted(experts, top_k, factor, counts, dtype, frozen):
    """[(payload, prediction)] of a step with backward, of one without, and of averaging the gradients."""
    from parallel import link

    rank = dist.get_rank()
    model = dense(experts, top_k, factor, dtype)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    model[1] = MixtureOfExperts.from_dense(model[1])
    tokens = tokens_of(rank, 0, counts, dtype)
    input_gradient, found = "0" not in frozen, []
    for backward in (True, False):
        with link.counted() as traffic:
            output = model(tokens)
            if backward:
                (output.sum() + model[1].auxiliary_loss).backward()
        wanted = expert.predict_communication(
            model[1].kept, WIDTH, dtype.itemsize, rank, input_gradient, backward
        )
        found.append((dict(traffic.payload), wanted))
    with link.counted() as traffic:
        average_gradients(model)
    return [*found, (dict(traffic.payload), expert_state.predict_communication(model))]


def many_counted(cases):
    return [moves_what_is_predicted(*case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_communication_is_what_is_predicted(ranks, world):
    cases = [
        (6, 2, None, (9, 9, 9), torch.float32, ()),
        (5, 3, 0.6, (7, 0, 13), torch.float64, ()),
        (4, 1, 1.0, (6, 5, 4), torch.bfloat16, ("0",)),
    ]
    for results in ranks.run(world, many_counted, cases, backend="link"):
        for case, found in zip(cases, results, strict=True):
            for payload, wanted in found:
                assert payload == wanted, case
                assert world == 1 or sum(payload.values()) > 0


def same_again():
    """Bit patterns of outputs and gradients of two runs, and those of bfloat16 against float64."""
    results, rank = [], dist.get_rank()
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float64):
        model = dense(6, 3, 1.0, torch.bfloat16).to(dtype)
        model[1] = MixtureOfExperts.from_dense(model[1])
        tokens = tokens_of(rank, 0, (40, 30), torch.bfloat16).to(dtype)
        output = model(tokens)
        output.square().sum().backward()
        average_gradients(model)
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    assert all(a.dtype == torch.bfloat16 for a in results[0])
    same = all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    return same, max(distance(a.double(), b) for a, b in zip(results[0], results[2], strict=True))


def test_a_run_repeats_bit_for_bit_and_bfloat16_is_close(ranks):
    for same, far in ranks.run(2, same_again):
        assert same
        assert far < 0.05


def in_subgroups():
    """Experts split over {0, 2} and over {1, 3}: two copies of the mixture, each with its own tokens."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    alone = dense(5, 2, None, torch.float64)
    model = copy.deepcopy(alone)
    model[1] = MixtureOfExperts.from_dense(model[1], groups[rank % 2])
    tokens = tokens_of(rank, 0, (9, 8, 7, 6), torch.float64)
    whole = full_state_dict(model, groups[rank % 2])
    assert all(torch.equal(whole[name], tensor) for name, tensor in alone.state_dict().items())
    return distance(model(tokens), alone(tokens))


def test_experts_in_subgroups(ranks):
    assert max(ranks.run(4, in_subgroups)) < 1e-13


def wrong():
    rank, messages = dist.get_rank(), []

    def said(function, *arguments):
        with pytest.raises(ValueError) as caught:
            function(*arguments)
        messages.append(str(caught.value))

    said(dense, 4, 5, None, torch.float32)
    said(dense, 4, 2, 0.0, torch.float32)
    said(MixtureOfExperts.from_dense, dense(1, 1, None, torch.float32)[1])
    said(MixtureOfExperts, nn.Linear(WIDTH, 4), [nn.Identity()])
    said(DenseMixtureOfExperts, nn.Linear(WIDTH, 4), [nn.Identity()])
    same = MixtureOfExperts.from_dense(dense(4, 2, None, torch.float32)[1])
    said(same, torch.randn(3, WIDTH, requires_grad=bool(rank)))
    differ = MixtureOfExperts.from_dense(dense(4, 2, None, torch.float32)[1])
    differ.to((torch.float32, torch.float64)[rank])
    said(differ, torch.randn(3, WIDTH, dtype=(torch.float32, torch.float64)[rank]))
    differ = MixtureOfExperts.from_dense(dense(4, 1 + rank, None, torch.float32)[1])
    said(differ, torch.randn(3, WIDTH))
    return messages


def test_what_is_wrong_is_said_on_every_rank(ranks):
    expected = [
        "top_k=5 is from 1 to 4 experts",
        "capacity_factor=0.0 is above 0, or None",
        "1 experts are fewer than the 2 ranks",
        "it was given 1",
        "the router knows 4 experts; there are 1",
        "whether the input takes a gradient.*rank 1 has",
        "rank 0 has .*; rank 1 has ",
        "rank 0 has .*; rank 1 has ",
    ]
    for messages in ranks.run(2, wrong):
        for message, pattern in zip(messages, expected, strict=True):
            assert re.search(pattern, message), (pattern, message)


def test_routing_admits_first_choices_before_second_and_early_tokens_before_late():
    logits = torch.tensor([[3.0, 2, 1], [3, 1, 2], [2, 3, 1], [3, 2, 1]])
    routing = route(logits, 2, capacity_factor=0.75)  # 4 tokens, 2 choices, 3 experts: 2 places each
    assert capacity(4, 3, 2, 0.75) == 2
    assert routing.chosen.tolist() == [[0, 1], [0, 2], [1, 0], [0, 1]]
    assert routing.wanted.tolist() == [4, 3, 1]
    assert routing.kept.tolist() == [2, 2, 1]
    assert routing.dropped == 3
    # Expert 0: first choices of tokens 0 and 1; expert 1: token 2's first, token 0's second; expert 2: token
    # 1's.
    assert routing.order.tolist() == [0, 2, 4, 1, 3]
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(4))
    single = route(logits, 1)
    torch.testing.assert_close(single.gates, logits.softmax(-1).amax(-1, keepdim=True))
    assert route(torch.zeros(3, 4), 2).chosen.tolist() == [[0, 1]] * 3


def test_losses_that_balance():
    even = torch.full((8, 4), 0.25)
    assert float(load_balancing_loss(even, torch.full((4,), 4), 8)) == 1.0
    one = torch.eye(4)[:1].expand(8, 4)
    assert float(load_balancing_loss(one, torch.tensor([8, 0, 0, 0]), 8)) == 4.0


def importance():
    """The importance loss over ranks against that of all tokens on one: (its error, its gradient's)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(6)
    weight = torch.randn(WIDTH, 5, dtype=torch.float64)
    tokens = [tokens_of(r, 0, (7, 0, 9), torch.float64) for r in range(world)]

    def loss_of(x, leaf, group_of_one=None):
        routing = route(x @ leaf, 2)
        if group_of_one is None:
            return importance_loss(routing.gates, routing.chosen, 5)
        gates = torch.zeros(5, dtype=x.dtype).index_add(0, routing.chosen.flatten(), routing.gates.flatten())
        return gates.var(correction=0) / gates.mean() ** 2

    whole, own = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    expected, loss = loss_of(torch.cat(tokens), whole, True), loss_of(tokens[rank], own)
    expected.backward()
    loss.backward()
    dist.all_reduce(own.grad)
    return float((loss - expected).detach().abs()), distance(own.grad / world, whole.grad)


@pytest.mark.parametrize("world", [1, 3])
def test_importance_is_of_all_ranks(ranks, world):
    assert max(map(max, ranks.run(world, importance))) < 1e-13
