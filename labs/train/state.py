"""What a checkpoint of a training run holds, in one form whatever the strategy.

    {"model": {name: tensor}, "exp_avg": {name: tensor}, "exp_avg_sq": ..., "optimizer_step": tensor}

Names and shapes are those of the plain model; of what ranks hold together each hands in a ``Sharded`` part.
So a run goes on with another number of ranks, or by another strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.checkpoint import PerRank
from parallel.expert import MixtureOfExperts
from parallel.fsdp_state import sharded, sharded_part
from parallel.local_sgd import LocalSGD
from parallel.memory_held import held_bytes
from parallel.sharded import Sharded
from parallel.tensor_state import full_tensors, local_tensors
from parallel.zero import ZeroRedundancyOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, Any]
"""Of the model's parameters, by name: tensors, or this rank's ``Sharded`` parts."""


class Checkpointed:
    """A model and its AdamW as a checkpoint sees them, where every rank has all of both."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def capture(self) -> dict[str, Any]:
        """The state, or, before a checkpoint is loaded, what to fill."""
        step = next(iter(self._inner_states()))["step"]
        return {
            **{kind: self._outward(tensors) for kind, tensors in self._live().items()},
            "optimizer_step": step.detach().clone(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``capture`` gave and a checkpoint has filled."""
        with torch.no_grad():
            for kind, tensors in self._live().items():
                self._inward(tensors, state[kind])
            for own in self._inner_states():
                own["step"].copy_(state["optimizer_step"])

    def held_bytes(self) -> int:
        """Bytes of the model and of what the optimizer holds for it now."""
        return held_bytes([*self.model.parameters(), *self._moments()])

    def _moments(self) -> Iterator[torch.Tensor]:
        for state in self._inner.state.values():
            yield from (state[key] for key in MOMENTS if key in state)

    # What strategies differ in.

    def _live(self) -> dict[str, Tensors]:
        """This rank's memory, by kind and name."""
        named = dict(self.model.named_parameters())
        self._inner_states()
        return {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            **{key: {n: self.optimizer.state[p][key] for n, p in named.items()} for key in MOMENTS},
        }

    def _outward(self, live: Tensors) -> Any:
        return live

    def _inward(self, live: Tensors, filled: Tensors) -> None:
        """What ``_outward`` gave was live memory: it is filled already."""

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW itself."""
        return self.optimizer

    def _inner_states(self) -> list[dict[str, Any]]:
        """The states of AdamW; of one that has made no step yet they are zeros."""
        inner = self._inner
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS},
                    }
        return list(inner.state.values())


class CheckpointedShards(Checkpointed):
    """``fully_shard``: a rank has some rows of each parameter and of its moments."""

    def _outward(self, live: Tensors) -> Tensors:
        parameters = dict(self.model.named_parameters())
        return {name: self._part(parameters[name], tensor) for name, tensor in live.items()}

    @staticmethod
    def _part(parameter: nn.Parameter, tensor: torch.Tensor) -> Any:
        layout = sharded(parameter)
        return sharded_part(layout, tensor) if layout else tensor


class CheckpointedZero(Checkpointed):
    """``ZeroRedundancyOptimizer``: a rank has the model, and the moments of a range of its elements."""

    optimizer: ZeroRedundancyOptimizer

    @property
    def _inner(self) -> torch.optim.Optimizer:
        assert self.optimizer.optim is not None
        return self.optimizer.optim

    def _live(self) -> dict[str, Tensors]:
        self._inner_states()
        named = dict(self.model.named_parameters())
        live: dict[str, Tensors] = {"model": {name: p.detach() for name, p in named.items()}}
        pieces = {piece.slot.param: piece for piece in self.optimizer.pieces()}
        for key in MOMENTS:
            live[key] = {}
            for name, parameter in named.items():
                piece, tensor, first = pieces.get(parameter), parameter.detach().new_empty(0), 0
                if piece is not None:
                    tensor, first = self._inner.state[piece.tensor][key], piece.first
                live[key][name] = Sharded(tensor, tuple(parameter.shape), first)
        return live


class CheckpointedTensorParallel(Checkpointed):
    """Shards along any dimension: gathered, and shared out again."""

    def _outward(self, live: Tensors) -> Tensors:
        return full_tensors(self.model, live)

    def _inward(self, live: Tensors, filled: Tensors) -> None:
        for name, part in local_tensors(self.model, filled).items():
            live[name].copy_(part)


class CheckpointedExperts(Checkpointed):
    """A mixture of experts: a layer's experts are stacked in one tensor, of which a rank has some rows."""

    def _outward(self, live: Tensors) -> Tensors:
        out = dict(live)
        for name, (layer, parts) in self._stacks().items():
            rows = torch.stack([out.pop(part) for part in parts])
            ((first, _),) = layer.partition.ranges[layer.rank]
            out[name] = Sharded(rows, (layer.partition.size, *rows.shape[1:]), first * rows[0].numel())
        return dict(sorted(out.items()))

    def _inward(self, live: Tensors, filled: Tensors) -> None:
        for name, (_, parts) in self._stacks().items():
            for part, row in zip(parts, filled[name].local.unbind(), strict=True):
                live[part].copy_(row)

    def _stacks(self) -> dict[str, tuple[MixtureOfExperts, list[str]]]:
        """Name of a stack -> its layer, and the names of this rank's parameters in it."""
        found = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, MixtureOfExperts):
                first = next(iter(layer.experts.values()))
                for key, _ in first.named_parameters():
                    parts = [f"{path}.experts.{number}.{key}" for number in layer.experts]
                    found[f"{path}.experts.{key}"] = layer, parts
        return found


class CheckpointedLocal(Checkpointed):
    """Local SGD and DiLoCo: between two averages every rank has a model and moments of its own."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, local: LocalSGD) -> None:
        super().__init__(model, optimizer)
        self.local = local

    def held_bytes(self) -> int:
        return super().held_bytes() + held_bytes(self.local.held())

    def capture(self) -> dict[str, Any]:
        return {**super().capture(), "local": self.local, "ranks": dist.get_world_size()}

    def restore(self, state: dict[str, Any]) -> None:
        """Ranks that the checkpoint does not know go on from rank 0's."""
        super().restore(state)
        saved, rank = state["ranks"], dist.get_rank()
        if dist.get_world_size() <= saved:
            return
        for tensors in self._live().values():
            for tensor in tensors.values():
                of_first = tensor.clone()
                dist.broadcast(of_first, 0)
                if rank >= saved:
                    tensor.copy_(of_first)

    def _outward(self, live: Tensors) -> Any:
        return PerRank(live)
