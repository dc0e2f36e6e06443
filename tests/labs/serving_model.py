"""A small model in float64, where rounding cannot make two tokens equal, and what it writes without a
cache."""

import random
from functools import cache

import torch

from labs.models.gpt import GPT
from labs.serving.layout import Layout
from labs.serving.paged import PagedGPT
from labs.serving.request import Request, Token
from labs.serving.weights import serving_model

CONTEXT = 128
SMALL = dict(blocks=40, block_size=4)


def model() -> GPT:
    return serving_model(64, 2, CONTEXT).double()


def requests(count: int, seed: int = 0, common: int = 9, longest: int = 40) -> list[Request]:
    """Half of them begin with the same ``common`` tokens."""
    rng = random.Random(seed)
    start = tuple(rng.choices(range(256), k=common))
    found = []
    for number in range(count):
        own = tuple(rng.choices(range(256), k=rng.randint(1, longest)))
        found.append(Request(number, (start if number % 2 else ()) + own, rng.randint(1, 12)))
    return found


@cache
def plain() -> GPT:
    return model()


@torch.no_grad()
def written_without_a_cache(request: Request) -> list[int]:
    """One forward of the whole sequence for each token."""
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.output:
        tokens.append(int(plain()(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in request.stop:
            break
    return tokens[len(request.prompt) :]


def engine(policy: str, role: str = "both", **settings: int):
    layout = Layout(policy, **{**SMALL, **settings})
    return layout.engine(role, PagedGPT(model(), layout.blocks, layout.block_size))


def run_all(engines, budget: int = 10_000) -> dict[int, list[Token]]:
    """Steps of the engines in turn until all are idle; the first hands over to the last."""
    found: dict[int, list[Token]] = {}
    for _ in range(budget):
        for each in engines:
            step = each.step()
            for event in step.events if step else ():
                if isinstance(event, Token):
                    found.setdefault(event.number, []).append(event)
                else:
                    engines[-1].receive(event, 0.0)
        if all(each.idle for each in engines):
            return found
    raise AssertionError(f"not idle after {budget} steps")
