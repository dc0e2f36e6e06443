"""A mixture of experts over ranks equals the dense loop, moves what it predicts, counts what it drops."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed
from torch import nn

from parallel import expert
from parallel.expert import DenseMixtureOfExperts, MixtureOfExperts, average_gradients, full_state_dict
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
    """Largest distance of losses, gradients and parameters from the dense mixture that sees all ranks' tokens.

    Capacity is of one rank's tokens, so the dense mixture sees them rank by rank; the loss that balances is of
    all tokens together (where the capacity is not what is compared).
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
