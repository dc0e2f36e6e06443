"""Linear layers whose weights are stored in another form. Each is put in the place of an ``nn.Linear``.

``forward`` is the fast way, ``exact`` the weight that it stands for in float64, against which the fast way is
proved. ``from_linear`` makes one of a trained layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels.matmul import reference
from labs.precision.sizes import rank_of


class QuantizedLinear(nn.Module):
    """Weight-only quantisation, symmetric: int8 with a scale a row, int4 with a scale a group of a row.

    Buffers, so that it is saved as any module is: weight (out, in) int8 or (out, in / 2) uint8, scale
    float32. Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (absmax); groups as in Frantar et al.
    2022, "GPTQ".
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group: int) -> QuantizedLinear:
        if bits not in (4, 8):
            raise ValueError(f"bits={bits}: there are kernels for 4 and 8")
        weight = linear.weight.detach()
        small, scale = kernels.quantize_int8(weight) if bits == 8 else kernels.quantize_int4(weight, group)
        return cls(small, scale, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = kernels.linear_int8 if self.weight.dtype is torch.int8 else kernels.linear_int4
        return linear(x, self.weight, self.scale, self.bias)

    def exact(self) -> torch.Tensor:
        widen = reference.dequantize_int8 if self.weight.dtype is torch.int8 else reference.dequantize_int4
        return widen(self.weight, self.scale.double())


class LowRankLinear(nn.Module):
    """x -> (x down^T) up^T + bias: down (rank, in), up (out, rank)."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, share: float) -> LowRankLinear:
        """The nearest of its rank (Eckart and Young 1936), by the singular values of the weight."""
        left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        rank = rank_of(linear.out_features, linear.in_features, share)
        root = values[:rank].sqrt()
        down, up = root[:, None] * right[:rank], left[:, :rank] * root
        return cls(down.to(linear.weight.dtype), up.to(linear.weight.dtype).contiguous(), linear.bias)

    @classmethod
    def random(cls, linear: nn.Linear, share: float) -> LowRankLinear:
        """Random factors, for a layer so large that its singular values would take minutes."""
        out, size = linear.weight.shape
        rank = rank_of(out, size, share)
        down, up = torch.randn(rank, size) / math.sqrt(size), torch.randn(out, rank) * 0.02
        return cls(down, up, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def exact(self) -> torch.Tensor:
        return self.up.detach().double() @ self.down.detach().double()


class LoRALinear(nn.Module):
    """A frozen layer and a trained update of low rank: x -> base(x) + (x down^T) up^T.

    up starts at zero, so that training starts from the frozen model. ``merged`` adds the update to the
    weight: the result costs what the frozen layer costs. Source: Hu et al. 2021, "LoRA", section 4.1.
    """

    def __init__(self, base: nn.Linear, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> LoRALinear:
        out, size = linear.weight.shape
        return cls(linear, torch.randn(rank, size) / math.sqrt(size), torch.zeros(out, rank))

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    def exact(self) -> torch.Tensor:
        return self.base.weight.detach().double() + self.up.detach().double() @ self.down.detach().double()

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return with_weight(self.base, self.exact().to(self.base.weight.dtype))


class SparseLinear(nn.Module):
    """A pruned weight as compressed rows (CSR): 4 bytes of value and 4 of column for each that is left."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, kept: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight (out, in), of which those are left where ``kept`` is True."""
        super().__init__()
        self.shape = tuple(weight.shape)
        rows = torch.zeros(len(weight) + 1, dtype=torch.int32)
        rows[1:] = kept.sum(1).cumsum(0)
        columns = torch.arange(weight.shape[1], dtype=torch.int32).expand_as(kept)[kept]
        parts = {"rows": rows, "columns": columns, "values": weight[kept]}
        for name, tensor in {**parts, "bias": None if bias is None else bias.detach()}.items():
            self.register_buffer(name, tensor)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            self.matrix()  # torch warns once that such tensors are in beta

    @classmethod
    def from_linear(cls, linear: nn.Linear, sparsity: float) -> SparseLinear:
        weight = linear.weight.detach()
        return cls(weight, kept_by_magnitude(weight, sparsity), linear.bias)

    def matrix(self) -> torch.Tensor:
        """torch's sparse tensor of the parts, which are not copied."""
        return torch.sparse_csr_tensor(
            self.rows, self.columns, self.values, self.shape, check_invariants=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (self.matrix() @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias

    def exact(self) -> torch.Tensor:
        return self.matrix().to_dense().double()


def kept_by_magnitude(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which weights are left, bool of weight's shape, when the smallest ``sparsity`` of them are dropped.

    Exactly round(sparsity numel) are dropped. Source: Han et al. 2015, section 3 (magnitude).
    """
    dropped = round(sparsity * weight.numel())
    magnitude = weight.detach().abs().flatten()
    if not dropped:
        return torch.ones_like(weight, dtype=torch.bool)
    threshold = magnitude.kthvalue(dropped).values
    kept = magnitude > threshold
    spared = weight.numel() - dropped - int(kept.sum())  # as large as the threshold itself
    kept[(magnitude == threshold).nonzero()[:spared, 0]] = True
    return kept.view_as(weight)


def with_weight(linear: Any, weight: torch.Tensor) -> nn.Linear:
    """An ordinary layer of this weight (out, in) and the bias of ``linear``, which may have another size."""
    made = nn.Linear(weight.shape[1], weight.shape[0], linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach())
    return made


def replace_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Each linear layer of the blocks becomes ``make(layer)``; embedding and head stay."""
    for parent in list(model.get_submodule("blocks").modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
