"""What a checkpoint holds: a state taken apart into named tensors and a tree of plain values, and put back.

The tree is JSON, the tensors are bytes, so reading one runs no code (a pickle does). Objects take part
through ``state_dict`` and ``load_state_dict``, as in ``torch.distributed.checkpoint``. Loading is driven by
the target: the checkpoint fills the tensors that are there and must fit them, whatever ranks wrote it.
"""

import itertools
import random
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from parallel.fsdp_state import local, module_parts, new_state, numbered, optimizer_parts
from parallel.sharded import Sharded, is_of_one_rank


@dataclass
class PerRank:
    """A part of the state that differs from rank to rank: generators, the model between two averagings.

    At another world size a rank that the checkpoint knows gets its own again; one that it lacks keeps
    what it has.
    """

    value: Any


class RandomGenerators:
    """Python's, NumPy's and torch's default random generators (the current CUDA device's too), as one
    state."""

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state = {
            "python": [version, torch.tensor(words), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


Tensors = dict[str, torch.Tensor | Sharded]
Node = dict[str, Any]


def is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def state_of(value: Any) -> Any:
    """What an object says of its state. Shards of ``parallel.fsdp.fully_shard`` are parts of whole tensors
    (those of PyTorch's are DTensors, which say so themselves)."""
    if isinstance(value, nn.Module):
        return module_parts(value)
    if isinstance(value, torch.optim.Optimizer):
        return optimizer_parts(value)
    return value.state_dict()


def refuse_what_is_of_one_rank(value: Any) -> None:
    """ValueError: parameters are of tensor or expert parallelism, which nothing would tell from replicas."""
    named: dict[str, torch.Tensor] = {}
    if isinstance(value, nn.Module):
        named = dict(value.named_parameters())
    elif isinstance(value, torch.optim.Optimizer):
        parameters = [parameter for group in value.param_groups for parameter in group["params"]]
        named = {f"parameter {number}": parameter for number, parameter in enumerate(parameters)}
    if split := [name for name, parameter in named.items() if is_of_one_rank(parameter)]:
        raise ValueError(
            f"{split[0]} of {type(value).__name__} is this rank's alone, a shard along any dimension or an "
            "expert: wrap in PerRank to go on with as many ranks, or save whole tensors "
            "(parallel.tensor_state.full_tensors, also of an optimizer's moments; parallel.expert_state)"
        )


def take_apart(
    value: Any, tensors: Tensors, rank: int, path: tuple[str, ...] = (), own: bool = False
) -> Node:
    """The tree of ``value``, as JSON has it; its tensors go into ``tensors`` under their path. own: it is
    within `PerRank`.

    Raises ValueError for what a checkpoint cannot hold without unpickling, and says where it stands.
    """
    where = "/".join(path)
    if isinstance(value, PerRank):
        ours: Tensors = {}
        node = take_apart(value.value, ours, rank, (*path, f"rank-{rank}"), own=True)
        if parts := [name for name, tensor in ours.items() if isinstance(tensor, Sharded)]:
            raise ValueError(f"{parts[0]} is a part of a whole tensor, so leave PerRank out")
        tensors.update(ours)
        return {"per_rank": [node]}
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if is_stateful(value):
        if not own:
            refuse_what_is_of_one_rank(value)
        value = state_of(value)
    if isinstance(value, (torch.Tensor, Sharded)):
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_quantized):
            raise ValueError(f"{where}: a checkpoint holds dense tensors, not {value.layout}")
        if where in tensors:
            raise ValueError(f"two tensors of the state have the name {where}")
        tensors[where] = value
        return {"tensor": where}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if type(key) not in (str, int)]:
            raise ValueError(f"{where}: the keys of a state are strings and integers, not {wrong[0]!r}")
        items = [
            (key, take_apart(item, tensors, rank, (*path, str(key)), own)) for key, item in value.items()
        ]
        return {"dict": [list(pair) for pair in items]}
    if type(value) in (list, tuple):
        nodes = [take_apart(item, tensors, rank, (*path, str(i)), own) for i, item in enumerate(value)]
        return {type(value).__name__: nodes}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise ValueError(
        f"{where}: a checkpoint holds tensors, dictionaries, lists, tuples, numbers, strings and objects "
        f"with state_dict and load_state_dict, not a {type(value).__name__}"
    )


def merge(trees: list[Node], path: tuple[str, ...] = ()) -> Node:
    """One tree of all ranks'. ValueError where they differ outside of `PerRank`, with the place and the
    ranks."""
    first, where = trees[0], "/".join(path) or "the state"
    for rank, tree in enumerate(trees):
        if tree.keys() != first.keys():
            kinds = f"{next(iter(first))} on rank 0 and a {next(iter(tree))} on rank {rank}"
            raise ValueError(f"{where} is a {kinds}")
    kind = next(iter(first))
    if kind == "per_rank":
        return {kind: [tree[kind][0] for tree in trees]}
    if kind == "dict":
        keys = [[key for key, _ in tree[kind]] for tree in trees]
        for rank, theirs in enumerate(keys):
            if theirs != keys[0]:
                raise ValueError(f"{where} has the keys {keys[0]} on rank 0 and {theirs} on rank {rank}")
        columns = zip(*(tree[kind] for tree in trees), strict=True)
        return {kind: [[c[0][0], merge([node for _, node in c], (*path, str(c[0][0])))] for c in columns]}
    if kind in ("list", "tuple"):
        for rank, tree in enumerate(trees):
            if len(tree[kind]) != len(first[kind]):
                lengths = f"{len(first[kind])} items on rank 0 and {len(tree[kind])} on rank {rank}"
                raise ValueError(f"{where} has {lengths}")
        columns = zip(*(tree[kind] for tree in trees), strict=True)
        return {kind: [merge(list(column), (*path, str(i))) for i, column in enumerate(columns)]}
    for rank, tree in enumerate(trees):
        if repr(tree) != repr(first):  # NaN equals itself here
            values = f"{first[kind]!r} on rank 0 and {tree[kind]!r} on rank {rank}"
            raise ValueError(f"{where} is {values}; wrap in PerRank what differs between ranks")
    return first


def is_plain(node: Node) -> bool:
    """Whether a tree holds plain values alone: what stands in their place is then replaced whole."""
    (kind, content), *_ = node.items()
    if kind == "dict":
        return all(is_plain(item) for _, item in content)
    return kind == "value" or (kind in ("list", "tuple") and all(map(is_plain, content)))


def is_plain_value(value: Any) -> bool:
    if isinstance(value, (Mapping, list, tuple)):
        return all(map(is_plain_value, value.values() if isinstance(value, Mapping) else value))
    return value is None or type(value) in (bool, int, float, str)


def plain(node: Node) -> Any:
    """The value of a tree for which `is_plain` holds."""
    (kind, content), *_ = node.items()
    if kind == "dict":
        return {key: plain(item) for key, item in content}
    if kind == "value":
        return content
    return (list if kind == "list" else tuple)(map(plain, content))


class Absent:
    """Stands where the target has nothing yet: an optimizer's state before its first step."""


@dataclass
class Restore:
    """Fits a checkpoint's tree to a target: ``tensors`` then says what is to be read, by name.

    stored: {name: (shape, dtype)} of the checkpoint.
    """

    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    rank: int
    tensors: Tensors

    def fit(
        self, target: Any, node: Node, path: tuple[str, ...] = (), free: bool = False
    ) -> Callable[[], Any]:
        """The function that, once the tensors have been read, returns what stands in ``target``'s place.

        free: what the target lacks is made, what it has besides is dropped. So it is within objects, which
        judge for themselves when they load; but a module has all its tensors, and so has what the user lists.
        """
        where = "/".join(path) or "the state"
        ((kind, content),) = node.items()
        if isinstance(target, PerRank):
            return self._fit_own(target, node, path)
        if isinstance(target, torch.Generator):
            state = self.fit(target.get_state(), node, path)
            return lambda: target.set_state(state())
        if is_stateful(target):
            template = state_of(target)
            if isinstance(target, torch.optim.Optimizer):
                template = self._with_state(target, template, node, path)
            loaded = self.fit(template, node, path, free=not isinstance(target, nn.Module))

            def load() -> Any:
                state, ours = loaded(), isinstance(target, (nn.Module, torch.optim.Optimizer))
                target.load_state_dict(local(state) if ours else state)
                return target

            return load
        if isinstance(target, (torch.Tensor, Sharded)) and kind == "tensor":
            shape, dtype = self.stored[content]
            if (shape, dtype) != (tuple(target.shape), target.dtype):
                here = f"{tuple(target.shape)} {target.dtype} here"
                raise ValueError(f"{where} is {shape} {dtype} in the checkpoint and {here}")
            self.tensors[content] = target
            return lambda: target
        if path and is_plain(node) and is_plain_value(target):
            return lambda: plain(node)
        if isinstance(target, MutableMapping) and kind == "dict":
            nodes = dict(content)
            if not free and target.keys() != nodes.keys():
                lacks, has = [k for k in target if k not in nodes], [k for k in nodes if k not in target]
                raise ValueError(f"{where}: the checkpoint lacks {lacks} and has {has}, which is not here")
            parts = {
                key: self.fit(target.get(key, Absent), item, (*path, str(key)), free) for key, item in content
            }

            def fill() -> Any:
                values = {key: part() for key, part in parts.items()}
                if free:
                    return values
                target.update(values)  # what the user holds stays the user's
                return target

            return fill
        alike = type(target) in (list, tuple) and kind == type(target).__name__
        if alike and (free or len(target) == len(content)):
            olds = itertools.chain(target, itertools.repeat(Absent))
            pairs = enumerate(zip(olds, content, strict=False))
            items = [self.fit(old, item, (*path, str(i)), free) for i, (old, item) in pairs]
            return lambda: type(target)(item() for item in items)
        if free or target is Absent:
            return self._make(node)
        raise ValueError(f"{where} is a {kind} in the checkpoint and a {type(target).__name__} here")

    def _fit_own(self, target: PerRank, node: Node, path: tuple[str, ...]) -> Callable[[], Any]:
        """This rank's own, if the checkpoint has it."""
        ((kind, content),) = node.items()
        if kind != "per_rank":
            raise ValueError(
                f"{'/'.join(path)} is the same on all ranks in the checkpoint; here it is PerRank"
            )
        if self.rank >= len(content):
            return lambda: target
        finish = self.fit(target.value, content[self.rank], path)

        def put() -> PerRank:
            target.value = finish()
            return target

        return put

    def _make(self, node: Node) -> Callable[[], Any]:
        """What the target has nothing for: tensors whole, on the CPU; whose they are will place them."""
        ((kind, content),) = node.items()
        if kind == "tensor":
            shape, dtype = self.stored[content]
            self.tensors[content] = made = torch.zeros(shape, dtype=dtype)
            return lambda: made
        if kind == "dict":
            parts = {key: self._make(item) for key, item in content}
            return lambda: {key: part() for key, part in parts.items()}
        if kind in ("list", "tuple"):
            items = [self._make(item) for item in content]
            return lambda: (list if kind == "list" else tuple)(item() for item in items)
        if kind == "per_rank":
            return self._make(content[self.rank]) if self.rank < len(content) else lambda: None
        return lambda: content

    def _with_state(
        self, optimizer: torch.optim.Optimizer, template: dict[str, Any], node: Node, path: tuple[str, ...]
    ) -> dict[str, Any]:
        """The optimizer's state dictionary with the tensors that its first step would make.

        One of its parameter's shape is made like the parameter: on its device, sharded like it. ValueError:
        what the checkpoint has in the optimizer's place is no optimizer's state.
        """
        of = numbered(optimizer, template)
        state = {number: dict(entries) for number, entries in template["state"].items()}
        saved = _items(node, path).get("state", {"dict": []})
        for number, entries in _items(saved, (*path, "state")).items():
            for key, entry in _items(entries, (*path, "state", str(number))).items():
                shape, dtype = self.stored[entry["tensor"]] if "tensor" in entry else (None, None)
                entries_here = state.setdefault(number, {})
                if number in of and entries_here.get(key) is None:
                    made = new_state(of[number], key, shape, dtype)
                    if made is not None:
                        entries_here[key] = made
        return {**template, "state": state}


def _items(node: Node, path: tuple[str, ...]) -> dict[Any, Node]:
    """What stands in a dictionary's tree. ValueError: it is another's."""
    ((kind, content),) = node.items()
    if kind != "dict":
        where = "/".join(path) or "the state"
        raise ValueError(f"{where} is a {kind} in the checkpoint; an optimizer's state has a dict there")
    return dict(content)
