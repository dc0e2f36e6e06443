"""What every form computed, held against float64 of the weights as they are stored.

A chain of sums in a format of precision eps is off by about eps times its largest number at each of the
roundings that lie behind one another; a model has some ten of them a block. Speculative decoding and greedy
decoding must agree token for token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labs.lab import Check
from labs.precision.config import Config

EPSILON = {"bfloat16": 2.0**-8}
ROUNDINGS = 10  # a block


def check(config: Config, outputs: Mapping[str, object]) -> Sequence[Check]:
    import torch

    found = []
    for address, output in outputs.items():
        group, _, form = address.partition("/")
        exact, slack, against = _reference(config, group, form)
        if not isinstance(output, torch.Tensor) or output.shape != exact.shape:
            raise TypeError(f"{address} returned no tensor of shape {tuple(exact.shape)}")
        if not output.is_floating_point():
            different = int((output != exact).sum())
            found.append(Check(address, different, 0, against))
            continue
        error = float((output.detach().double() - exact).abs().max())
        depth = ROUNDINGS * (1 if group in ("cache", "prompt") else _layers(config, group))
        rounding = EPSILON.get(form, 2.0**-23 * math.sqrt(_sum_length(config, group))) * math.sqrt(depth)
        found.append(Check(address, error, rounding * float(exact.abs().max()) + slack, against))
    return found


def _layers(config: Config, group: str) -> int:
    return config.recipe.model.layers if group == "quality" else config.large.layers


def _sum_length(config: Config, group: str) -> int:
    """Numbers in the longest sum of a float32 product."""
    if group == "cache":
        return config.context
    return config.recipe.model.size_of_hidden if group == "quality" else config.large.size_of_hidden


def _reference(config: Config, group: str, form: str) -> tuple[Any, float, str]:
    """(the exact output, what a form may be off by on top of rounding, in words what it is)."""
    import torch

    with torch.no_grad():
        if group == "quality":
            return _trained(config, form)
        if group == "cache":
            return _attention(config, form)
        return _large(config, group, form), 0.0, "the stored weights in float64"


def _trained(config: Config, form: str) -> tuple[Any, float, str]:
    import copy

    import torch

    from labs.precision import forms
    from labs.precision.exact import in_float64
    from labs.precision.quality import held_out
    from labs.precision.ways import prompts

    made = forms.trained(config)
    if form == "speculative":
        target = in_float64(forms.small(made, "int8"))
        greedy = [target.generate(each[None], config.tokens) for each in prompts(config)]
        return torch.cat(greedy), 0.0, "the large model's own greedy tokens"
    model: Any = forms.small(made, form)
    tokens = held_out(config.windows, made.base.recipe.model.context)[0][:1]
    if form == "early_exit":
        model = copy.deepcopy(model).double()
        return model(tokens)[0], 0.0, "the model and its exit in float64"
    exact = in_float64(model)
    logits = forms.logits_of(exact, form)(tokens)
    slack = 0.0
    if form.startswith("cache_int"):
        # A number in the middle between two steps may be rounded either way in float32: few are.
        slack = 0.1 * float((logits - exact(tokens)).abs().max())
    return logits, slack, "the stored weights in float64"


def _large(config: Config, group: str, form: str) -> Any:
    import torch.nn.functional as F

    from labs.precision import forms
    from labs.precision.exact import of_copies
    from labs.precision.ways import Pass

    if group == "speculative":
        count = 1 if form == "token" else config.lookahead + 1
        return Pass(of_copies(forms.large(config.large, "int8")), count)()
    model: Any = forms.large(config.block if group == "prompt" else config.large, form)
    if form == "early_exit":
        states = _first_blocks(of_copies(model.model), model.depth, Pass(model, 1).tokens)
        norm = model.norm
        weight, bias = norm.weight.double(), norm.bias.double()
        normal = F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)
        return F.linear(normal, model.head.weight.double())
    return Pass(of_copies(model), config.prompt if group == "prompt" else 1)()


def _first_blocks(model: Any, depth: int, tokens: Any) -> Any:
    import torch

    x = model.embedding(tokens, torch.arange(tokens.shape[1]))
    for block in model.blocks[:depth]:
        x = block(x)
    return x


def _attention(config: Config, form: str) -> tuple[Any, float, str]:
    import torch

    from labs.precision.cache import quantize
    from labs.precision.ways import cached

    query, keys, values = cached(config)
    if form == "int8":
        (keys, key_scale), (values, value_scale) = quantize(keys, 8), quantize(values, 8)
    elif form == "bfloat16":
        keys, values = keys.bfloat16(), values.bfloat16()
    exact = torch.empty(query.shape, dtype=torch.float64)
    for index in range(config.sequences):  # one sequence at a time: float64 is twice as large
        k, v = keys[index].double(), values[index].double()
        if form == "int8":
            k, v = k * key_scale[index], v * value_scale[index]
        scores = (k @ query[index].double()[..., None])[..., 0] / math.sqrt(query.shape[-1])
        exact[index] = (scores.softmax(-1)[:, None] @ v)[:, 0]
    return exact, 0.0, "attention over the stored cache in float64"
