"""Every form by its name, of the small trained model and of the large random one.

What is built is remembered while something uses it: the proof finds the very model that a step holds, and a
gigabyte is given back with the last step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from labs.models.configuration import GPTConfig
from labs.models.gpt import GPT
from labs.precision import cache, compress, sizes, storage
from labs.precision.config import Config
from labs.precision.early_exit import EarlyExit
from labs.precision.training import Family, family

_built: WeakValueDictionary[tuple[GPTConfig, str], nn.Module] = WeakValueDictionary()


# --- the trained model ---------------------------------------------------------------------------


def trained(config: Config) -> Family:
    return family(config.recipe, config.limit)


def small(made: Family, form: str) -> nn.Module:
    """The trained model in a form of ``sizes``, as it is stored."""
    base = made.base.model
    makes: dict[str, Callable[[], nn.Module]] = {
        "bfloat16": lambda: compress.halved(base),
        "int8": lambda: compress.quantized(base, 8, sizes.GROUP),
        "int4": lambda: compress.quantized(base, 4, sizes.GROUP),
        "pruned": lambda: compress.pruned(base, sizes.SPARSITY),
        "structured": lambda: compress.structured(base, sizes.KEEP),
        "healed": lambda: made.healed,
        "tuned": lambda: made.tuned,
        "low_rank": lambda: compress.low_rank(base, sizes.RANK_SHARE),
        "distilled": lambda: made.student,
        "alone": lambda: made.alone,
        "early_exit": lambda: made.exit,
        "int8_student": lambda: compress.quantized(made.student, 8, sizes.GROUP),
    }
    return makes.get(form, lambda: base)()


@dataclass(frozen=True)
class Stored:
    """A form that went through a file. logits: of tokens (windows, length). bytes: of the file's tensors."""

    model: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    bytes: int


def stored(made: Family, form: str) -> Stored:
    model = small(made, form)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{form}.safetensors"
        count = storage.write(model, path, masks=form == "pruned")
        model = storage.read(model, path)
    return Stored(model, logits_of(model, form), count)


def logits_of(model: Any, form: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model predicts in this form."""
    if form == "early_exit":
        return lambda tokens: model(tokens)[0]
    if form.startswith("cache_int"):
        return cache.with_cache_of(model, int(form.removeprefix("cache_int")))
    return model


# --- the large model -----------------------------------------------------------------------------


def large(model: GPTConfig, form: str) -> nn.Module:
    """A model of random weights in a form of ``sizes``; the same one while anything holds it."""
    found = _built.get((model, form))
    if found is None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            found = _large(model, form).eval().requires_grad_(False)
        _built[model, form] = found
    return found


def _large(model: GPTConfig, form: str) -> nn.Module:
    if form == "early_exit":  # every token leaves
        return EarlyExit(_float32(model), model.layers // 2, threshold=0.0)
    if form == "lora":
        made = compress.adapted(_float32(model), sizes.ADAPTER_RANK)
        ends = (".down", ".up")
        first = {name: p for name, p in made.blocks[0].named_parameters() if name.endswith(ends)}
        for parameter in first.values():  # trained ones are not zero
            parameter.normal_(std=0.02)
        for block in made.blocks[1:]:
            parameters = dict(block.named_parameters())
            for name, parameter in first.items():
                parameters[name].copy_(parameter)
        return made
    one = GPT(replace(sizes.config_of(model, "distilled" if form == "distilled" else ""), layers=1))
    makes: dict[str, Callable[[], GPT]] = {
        "bfloat16": lambda: compress.halved(one),
        "int8": lambda: compress.quantized(one, 8, sizes.GROUP),
        "int4": lambda: compress.quantized(one, 4, sizes.GROUP),
        "structured": lambda: compress.structured(one, sizes.KEEP),
        "low_rank": lambda: compress.low_rank(one, sizes.RANK_SHARE, random=True),
        "sparse": lambda: compress.sparse(one, sizes.SPARSITY),
    }
    return _repeated(makes.get(form, lambda: one)(), sizes.config_of(model, form).layers)


def _float32(model: GPTConfig) -> GPT:
    found = large(model, "float32")
    assert isinstance(found, GPT)
    return found


def _repeated(one: GPT, layers: int) -> GPT:
    """``layers`` copies of the only block, each in memory of its own: as much to read, less to draw."""
    one.blocks.extend(copy.deepcopy(one.blocks[0]) for _ in range(layers - 1))
    one.config = replace(one.config, layers=layers)
    return one
