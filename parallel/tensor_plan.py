"""A plan that makes a model tensor-parallel without its knowledge: names, and what becomes of each.

    parallelize(model, {
        "embedding": "vocabulary",
        "blocks.*.attention": "input",            # its layers share one input: its gradient is summed once
        "blocks.*.attention.query": Column(unit=head_dim),
        "blocks.*.attention.output": Row(unit=head_dim),
        "blocks.*.attention.heads": "divided",    # a number that the module computes with
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "head": "column",                         # tied to the embedding: stays tied
    }, group)

    "column", "row"          a linear layer: ``parallel.tensor``
    "column_gathered"        column-parallel, its output gathered
    "row_split"              row-parallel, its input whole and split here
    "vocabulary"             an embedding: ``parallel.vocabulary``
    "input"                  a module whose first argument feeds several column-parallel layers below it
    "divided"                an int attribute, such as a number of heads: this rank's share

with sequence parallelism (``sequence=True``), where column takes and row gives shards of the sequence, also

    "vocabulary_scattered"   the embedding gives shards
    "scatter"                a module whose first argument is whole and becomes a shard
    "gather"                 a module that works on shards and whose output is gathered
    "sequence"               a module that works on shards, such as a norm, dropout: its gradients are summed

In a module of the last four and of "input", random numbers (dropout) are this rank's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.agreement import DIMENSIONS, check_same
from parallel.partition import Partition, concatenated, split
from parallel.same_module import synchronise_module
from parallel.sequence import SequenceParallel, draw_apart, sum_gradients
from parallel.tensor import ColumnParallelLinear, RowParallelLinear
from parallel.tensor_regions import Group, copy_to_region
from parallel.vocabulary import VocabParallelEmbedding


@dataclass(frozen=True)
class Column:
    """A column-parallel linear layer. unit: features that stay together, such as a head's. sections: equal
    parts of the output that are split each for itself (3 of a fused query, key, value; 2 of a fused gate and
    up). partition: in place of both, such as of ``split_heads``."""

    unit: int = 1
    sections: int = 1
    partition: Partition | None = None
    gather_output: bool = False


@dataclass(frozen=True)
class Row:
    """A row-parallel linear layer. unit, partition: as the column-parallel layer before it has."""

    unit: int = 1
    partition: Partition | None = None
    input_is_parallel: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary-parallel embedding. scattered: its output is a shard of the sequence."""

    partition: Partition | None = None
    scattered: bool = False


@dataclass(frozen=True)
class Divided:
    """An int attribute of a module: ``values[rank]`` takes its place."""

    values: Sequence[int]


Style = str | Column | Row | Vocabulary | Divided

_STYLES: dict[str, Style] = {
    "column": Column(),
    "column_gathered": Column(gather_output=True),
    "row": Row(),
    "row_split": Row(input_is_parallel=False),
    "vocabulary": Vocabulary(),
    "vocabulary_scattered": Vocabulary(scattered=True),
}
_HOOKS = ("input", "scatter", "gather", "sequence")
_SIGNATURES = 2
"""Tensors among the model's arguments whose shapes are compared over the ranks at each forward."""

SIGNATURE_BYTES = _SIGNATURES * (DIMENSIONS + 2) * 8
"""What each rank tells the others for that."""


@dataclass
class TensorParallel:
    """What ``parallelize`` did to a model; it lies there as ``model.tensor_parallel``."""

    group: Group
    sequence: SequenceParallel | None
    hooks: dict[str, str] = field(default_factory=dict)
    """Name of a submodule -> "input", "scatter", "gather" or "sequence"."""


def parallelize(
    module: nn.Module, plan: Mapping[str, Style], group: Group = None, *, sequence: bool = False, dim: int = 1
) -> nn.Module:
    """Replace submodules of ``module`` by their parallel form, in place, and return it.

    plan: name -> style; ``*`` in a name stands for one component or a part of it. Every rank holds the whole
    module before, and gets the first rank's values; afterwards it has its shards, and tied weights are still
    tied. The model is called with the same whole input on every rank of the group, which each call checks,
    and with torch's generators in the same state (seeded alike): dropout outside the parallel regions must
    be the same. sequence: with sequence parallelism along dimension ``dim``.

    ValueError: a name that fits nothing, a style that does not exist or not for that module, a tied weight of
    which the plan splits one use only, layers split in ways that do not fit.
    """
    state = TensorParallel(group, SequenceParallel(group, dim) if sequence else None)
    chosen = _chosen(module, plan)
    synchronise_module(module, group)
    inputs = [name for name, style in chosen.items() if style == "input"]
    tied: dict[int, tuple[nn.Parameter, nn.Parameter, tuple[Partition, int] | None, str]] = {}
    replaced: dict[int, nn.Module] = {}
    for name, style in chosen.items():
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        old = getattr(owner, last)
        if isinstance(style, Divided) or style == "divided":
            setattr(owner, last, _share(name, old, style, group))
        elif isinstance(style, str):
            _hook(old, name, style, state)
        else:
            copied = any(name.startswith(f"{above}.") for above in inputs)
            if id(old) not in replaced:
                replaced[id(old)] = _replacement(old, name, style, copied, state)
                replaced[id(old)].checks_input = False  # the model's is, once
                _tie(old, replaced[id(old)], name, tied)
            setattr(owner, last, replaced[id(old)])
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in tied and tied[id(parameter)][2] is not None:
            raise ValueError(
                f"{name} is tied to {tied[id(parameter)][3]}, which is split: the plan needs both"
            )
    module.tensor_parallel = state
    module.register_forward_pre_hook(_check_inputs(state.group), with_kwargs=True)
    return module


def _chosen(module: nn.Module, plan: Mapping[str, Style]) -> dict[str, Style]:
    """Name -> style, the styles of strings looked up. ValueError as ``parallelize`` says."""
    chosen: dict[str, Style] = {}
    names = list(_names(module))
    for pattern, style in plan.items():
        if isinstance(style, str) and style not in (*_STYLES, *_HOOKS, "divided"):
            known = ", ".join((*_STYLES, *_HOOKS, "divided"))
            raise ValueError(f"{pattern}: {style!r} is not a style; they are {known}")
        wanted = pattern.split(".")
        found = [
            name
            for name in names
            if len(parts := name.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
        ]
        if not found:
            near = difflib.get_close_matches(pattern, names, 1, 0.0)
            raise ValueError(f"{pattern} is no submodule" + (f"; the nearest is {near[0]}" if near else ""))
        for name in found:
            if name in chosen:
                raise ValueError(f"{name} fits two lines of the plan; {pattern} is the second")
            chosen[name] = _STYLES.get(style, style) if isinstance(style, str) else style
    return chosen


def _names(module: nn.Module) -> Iterator[str]:
    """Of submodules, and of their int attributes."""
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            yield name
        for key, value in vars(child).items():
            if type(value) is int:
                yield f"{name}.{key}" if name else key


def _share(name: str, value: Any, style: Style, group: Group) -> int:
    if type(value) is not int:
        raise ValueError(f"{name} is a {type(value).__name__}; what can be divided is an int")
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    values = style.values if isinstance(style, Divided) else split(value, world).sizes
    if len(values) != world or min(values) < 1:
        raise ValueError(f"{name}={value} gives {list(values)} to the {world} ranks; each needs at least 1")
    return values[rank]


def _replacement(
    old: nn.Module, name: str, style: Column | Row | Vocabulary, copied: bool, state: TensorParallel
) -> nn.Module:
    world = dist.get_world_size(state.group)
    kind = nn.Embedding if isinstance(style, Vocabulary) else nn.Linear
    if not isinstance(old, kind):
        raise ValueError(f"{name} is a {type(old).__name__}; {type(style).__name__} wants nn.{kind.__name__}")
    if isinstance(style, Vocabulary):
        if style.scattered and state.sequence is None:
            raise ValueError(f"{name}: vocabulary_scattered needs sequence=True")
        return VocabParallelEmbedding.from_embedding(
            old,
            state.group,
            partition=style.partition,
            sequence=state.sequence if style.scattered else None,
        )
    partition = style.partition
    try:
        if isinstance(style, Row):
            partition = partition or split(old.in_features, world, style.unit)
            return RowParallelLinear.from_linear(
                old,
                state.group,
                partition=partition,
                input_is_parallel=style.input_is_parallel,
                sequence=state.sequence,
            )
        if partition is None:
            if old.out_features % style.sections:
                raise ValueError(f"{old.out_features} features are not {style.sections} equal sections")
            section = split(old.out_features // style.sections, world, style.unit)
            partition = concatenated([section] * style.sections)
        return ColumnParallelLinear.from_linear(
            old,
            state.group,
            partition=partition,
            gather_output=style.gather_output,
            input_is_copied=copied,
            sequence=state.sequence,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _tie(
    old: nn.Module,
    new: nn.Module,
    name: str,
    tied: dict[int, tuple[nn.Parameter, nn.Parameter, tuple[Partition, int] | None, str]],
) -> None:
    """Give ``new`` the parameter that took an old one's place elsewhere. ``tied`` keeps old ones alive."""
    for key, parameter in old.named_parameters(recurse=False):
        place = new.shards().get(key)
        shard = getattr(new, key)
        if id(parameter) in tied:
            _, shard, other, first = tied[id(parameter)]
            if other != place:
                raise ValueError(f"{name}.{key} is tied to {first}, which is split in another way")
            setattr(new, key, shard)
        tied[id(parameter)] = parameter, shard, place, f"{name}.{key}"


def _hook(old: nn.Module, name: str, style: str, state: TensorParallel) -> None:
    sequence = state.sequence
    if style != "input" and sequence is None:
        raise ValueError(f"{name}: {style} needs sequence=True")
    if not isinstance(old, nn.Module):
        raise ValueError(f"{name} is a {type(old).__name__}, not a submodule")
    if style == "input":

        def copy(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *others = arguments
            if sequence is None:
                return (copy_to_region(first, state.group), *others)
            return (sequence.gather(first, partial=True), *others)

        old.register_forward_pre_hook(copy)
    elif sequence is not None and style == "scatter":
        old.register_forward_pre_hook(lambda _, arguments: (sequence.scatter(arguments[0]), *arguments[1:]))
    elif sequence is not None and style == "gather":
        old.register_forward_hook(lambda _, arguments, output: sequence.gather(output))
    if style in ("gather", "sequence"):
        sum_gradients(old, state.group)
    draw_apart(old, dist.get_rank(state.group))
    state.hooks[name] = style


def _check_inputs(group: Group) -> Any:
    def check(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        tensors = (tensors + [torch.empty(0, device=tensor.device) for tensor in tensors[:1]])[:_SIGNATURES]
        if tensors:
            check_same(tensors, "the input of a tensor-parallel model", group)

    return check
