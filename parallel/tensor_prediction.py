"""What a tensor-parallel model communicates: the sum over its layers, and over what surrounds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch.distributed as dist
from torch import nn

from parallel.tensor import ColumnParallelLinear
from parallel.tensor_plan import SIGNATURE_BYTES, TensorParallel


def predict_communication(
    module: nn.Module,
    batch: int,
    length: int,
    itemsize: int = 4,
    without_input_gradient: Collection[str] = (),
) -> dict[str, int]:
    """Bytes that one rank moves in one forward and backward of a module of parallel layers.

    Operation -> bytes, each call counted as the larger of its input and output. The module sees (batch,
    length) positions, activations of ``itemsize`` bytes. without_input_gradient: names of layers whose input
    takes no gradient (what comes before is frozen). A loss adds ``vocabulary_loss.predict_communication``.

    Megatron-LM's sums: without sequence parallelism one all-reduce of the activations for each row-parallel
    layer forward, and one for each column-parallel layer (or each "input") backward; with it, a
    reduce-scatter and an all-gather in place of each, and the gather again in backward.
    """
    moved: Counter[str] = Counter()
    state = getattr(module, "tensor_parallel", None)
    columns = [layer for layer in module.modules() if isinstance(layer, ColumnParallelLinear)]
    for name, layer in module.named_modules():
        if hasattr(layer, "predict_communication"):
            moved += layer.predict_communication(batch, length, itemsize, name not in without_input_gradient)
    if not isinstance(state, TensorParallel) or (world := dist.get_world_size(state.group)) == 1:
        return dict(moved)
    moved["all_gather"] += world * SIGNATURE_BYTES
    padded = length if state.sequence is None else world * -(-length // world)
    for name, style in state.hooks.items():
        hooked = module.get_submodule(name)
        below = [layer for layer in hooked.modules() if isinstance(layer, ColumnParallelLinear)]
        gradient = name not in without_input_gradient
        whole = batch * padded * (below or columns)[0].in_features * itemsize
        if style == "input" and state.sequence is None:
            moved["all_reduce"] += whole * gradient
        elif style == "input":
            moved["all_gather"] += whole
            moved["reduce_scatter"] += whole * gradient
        elif style == "scatter":
            moved["all_gather"] += whole * gradient
        elif style == "gather":
            moved["all_gather"] += whole
        if style in ("gather", "sequence"):
            moved["all_reduce"] += sum(p.nbytes for p in hooked.parameters() if p.requires_grad)
    return dict(+moved)
