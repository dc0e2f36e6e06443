"""Which tile each attention kernel uses on which GPU, and how tensors are handed to the kernels.

The tiles were chosen without a GPU, from what the compiler makes of them (Triton 3.7.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


class Tile(NamedTuple):
    """rows and columns: queries and keys of a tile.

    descriptors: "host" or "device": tiles are fetched by the copy engine (TMA), by a descriptor made there;
    "": by pointers. specialized: warps with roles of their own. precision: of float32 products.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    descriptors: str = ""
    specialized: bool = False
    precision: str = "ieee"


def configuration(head_dim: int, dtype: torch.dtype, direction: str, target: str) -> Tile:
    return Tile(64, 64, 4, 2, "host" if target in ("sm_90", "sm_100") and direction != "decode" else "")


def padded(size: int) -> int:
    """The power of two that holds size, at least the 16 that matrix instructions take."""
    return max(16, triton.next_power_of_2(size))


def target_of(tensor: torch.Tensor) -> str:
    """The key of the tables for this tensor's GPU; on the CPU (the interpreter) Hopper's."""
    if not tensor.is_cuda:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def describable(*tensors: torch.Tensor) -> bool:
    """Can the copy engine fetch tiles of these? It takes starts and strides of multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride * tensor.itemsize % 16 == 0)
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in tensors
    )


def describe(tensor: torch.Tensor, rows: int) -> Any:
    """A descriptor of (batch, heads, length, dim), whose tiles are rows x dim of one head."""
    width = padded(tensor.shape[-1])
    # The stride of a dimension of one element means nothing and may be anything; the copy engine still reads it.
    strides = [width if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, width])


def handed(tensors: Sequence[torch.Tensor], rows: Sequence[int], tile: Tile) -> tuple[list[Any], str]:
    """The tensors as the tile wants them, descriptors or themselves, and which of both (``DESCRIPTORS``)."""
    if not tile.descriptors or not describable(*tensors):
        return list(tensors), ""
    if tile.descriptors == "host":
        return [describe(tensor, size) for tensor, size in zip(tensors, rows, strict=True)], "host"
    triton.set_allocator(_scratch)
    return list(tensors), "device"


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def broadcast_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> tuple[Any, list[int], int]:
    """(mask or a stand-in, its strides over (batch, heads, query length), MASK), keys contiguous."""
    if mask is None:
        return query, [0, 0, 0], 0
    mask = mask.expand(*mask.shape[:-1], key.shape[2])
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    mask = mask.expand(*query.shape[:3], key.shape[2])
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), list(mask.stride()[:3]), 1
    return mask, list(mask.stride()[:3]), 2


def dropout_numbers(dropout_p: float, seed: int) -> tuple[float, int, int]:
    """(1 / share kept, seed, threshold): a weight is dropped where its 32 random bits are below the threshold."""
    keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return keep_scale, seed, min(round(dropout_p * 2**32), 2**32 - 1)


def types_of(kernel: Any, constants: dict[str, Any], dtype: str, descriptors: str) -> dict[str, str]:
    """The Triton types of a kernel's arguments, as the functions here hand them over on a GPU (ahead of time)."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("query", "key", "value", "grad") and descriptors == "host":
            rows = constants["ROWS" if name in ("query", "grad") else "COLUMNS"]
            types[name] = f"tensordesc<{dtype}[1,1,{rows},{constants['WIDTH']}]>"
        elif name == "mask" and constants["MASK"] == 1:
            types[name] = "*u8!"
        elif name in ("log_sum_exp", "delta", "exponent", "exponents", "partial"):
            types[name] = "*fp32!"
        elif name in ("block_table", "context_lengths"):
            types[name] = "*i32!"
        elif name.startswith("stride"):
            types[name] = "i32!"
        elif name.endswith("scale"):
            types[name] = "fp32"
        elif name in ("seed", "threshold"):
            types[name] = "i64"
        elif name in _POINTERS:
            types[name] = f"*{dtype}!"
        else:
            types[name] = "i32"
    return types


_POINTERS = ("query", "key", "value", "mask", "output", "grad", "key_cache", "value_cache") + tuple(
    f"{name}_gradient" for name in ("query", "key", "value")
)
