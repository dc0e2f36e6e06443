"""Which tile each attention kernel uses on which GPU, and how tensors are handed to the kernels.

The tiles were chosen without a GPU, from what the compiler makes of them (Triton 3.7.1; on sm_90 also 3.6.0
and 3.9.0)."""

from __future__ import annotations

import math
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


HOST, DEVICE = "host", "device"

TILES: dict[tuple[str, str], dict[int, tuple[Tile, ...]]] = {
    ("sm_90", "forward"): {
        64: (
            Tile(128, 128, 8, 3, HOST),
            Tile(128, 64, 4, 3, HOST),
            Tile(128, 128, 4, 2, DEVICE, specialized=True),
        ),
        128: (
            Tile(128, 128, 8, 2, HOST),
            Tile(128, 64, 8, 3, HOST),
            Tile(128, 128, 4, 2, DEVICE, specialized=True),
            Tile(128, 64, 4, 3, DEVICE, specialized=True),
        ),
        256: (Tile(128, 64, 8, 2, HOST), Tile(128, 32, 8, 3, HOST)),
    },
    ("sm_90", "backward keys"): {
        64: (Tile(64, 128, 8, 2, HOST), Tile(64, 64, 4, 2, HOST)),
        128: (Tile(64, 128, 8, 3, HOST), Tile(64, 128, 8, 2, HOST), Tile(64, 64, 4, 2, HOST)),
        256: (Tile(16, 64, 8, 3, HOST), Tile(32, 64, 8, 3, HOST)),
    },
    ("sm_90", "backward queries"): {
        64: (Tile(128, 128, 8, 2, HOST), Tile(128, 64, 8, 2, HOST), Tile(64, 64, 4, 2, HOST)),
        128: (Tile(128, 64, 8, 2, HOST), Tile(128, 128, 8, 2, HOST), Tile(64, 64, 4, 2, HOST)),
        256: (Tile(64, 64, 8, 2, HOST), Tile(64, 32, 8, 2, HOST)),
    },
    ("sm_100", "forward"): {
        64: (Tile(128, 128, 8, 3, HOST),),
        128: (Tile(128, 128, 8, 2, HOST),),
        256: (Tile(128, 64, 8, 2, HOST),),
    },
    ("sm_100", "backward keys"): {
        64: (Tile(64, 128, 8, 2, HOST),),
        128: (Tile(64, 64, 8, 2, HOST),),
        256: (Tile(32, 64, 8, 3, HOST),),
    },
    ("sm_100", "backward queries"): {
        64: (Tile(128, 128, 8, 2, HOST),),
        128: (Tile(128, 64, 8, 2, HOST),),
        256: (Tile(64, 64, 8, 2, HOST),),
    },
    ("sm_80", "forward"): {
        64: (Tile(128, 64, 8, 2),),
        128: (Tile(64, 64, 4, 2),),
        256: (Tile(64, 32, 8, 2),),
    },
    ("sm_80", "backward keys"): {
        64: (Tile(64, 128, 8, 2),),
        128: (Tile(32, 64, 8, 2),),
        256: (Tile(16, 32, 8, 1),),
    },
    ("sm_80", "backward queries"): {
        64: (Tile(128, 64, 8, 2),),
        128: (Tile(128, 32, 8, 2),),
        256: (Tile(64, 16, 8, 2),),
    },
    ("gfx942", "forward"): {
        64: (Tile(128, 64, 4, 2),),
        128: (Tile(128, 32, 4, 2),),
        256: (Tile(64, 32, 4, 1),),
    },
    ("gfx942", "backward keys"): {
        64: (Tile(64, 64, 4, 1),),
        128: (Tile(32, 64, 4, 1),),
        256: (Tile(16, 32, 4, 1),),
    },
    ("gfx942", "backward queries"): {
        64: (Tile(64, 64, 4, 2),),
        128: (Tile(64, 32, 4, 1),),
        256: (Tile(32, 32, 4, 1),),
    },
}
"""(target, kernel) -> head dimension up to -> tiles for 16-bit tensors: the one that is used, then those
worth timing.

What was seen ahead of time: on sm_90 tiles of 128 queries with 8 warps give each warp group one 64-row matrix
instruction and stay below 255 registers; 4 warps at 128 x 64 spill in the split loop, except where warps have
roles of their own (168 registers, a producer and two consumers). The keys' kernel holds two accumulators,
so that it takes half the queries. sm_80's tiles take at most 99 KiB, which chips of 8.6, 8.9 and 12.0 have
too. gfx942 has 64 KiB, and 512 registers a lane only with 4 waves.
"""

_HOPPER_LIGHT = {
    "forward": {64: Tile(128, 64, 8, 2, HOST), 128: Tile(128, 32, 8, 2, HOST), 256: Tile(64, 32, 8, 2, HOST)},
    "backward keys": {
        64: Tile(64, 128, 8, 2, HOST),
        128: Tile(32, 128, 8, 2, HOST),
        256: Tile(16, 64, 8, 2, HOST),
    },
    "backward queries": {
        64: Tile(128, 64, 8, 2, HOST),
        128: Tile(64, 32, 4, 2, HOST),
        256: Tile(64, 32, 8, 2, HOST),
    },
}
LIGHT: dict[tuple[str, str], dict[int, Tile]] = {
    **{(target, kernel): rows for target in ("sm_90", "sm_100") for kernel, rows in _HOPPER_LIGHT.items()},
    ("sm_80", "forward"): {64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_80", "backward keys"): {64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
    ("sm_80", "backward queries"): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("gfx942", "forward"): {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(64, 32, 4, 1)},
    ("gfx942", "backward keys"): {64: Tile(32, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
    ("gfx942", "backward queries"): {
        64: Tile(64, 32, 4, 1),
        128: Tile(64, 32, 4, 1),
        256: Tile(32, 32, 4, 1),
    },
}
"""The same where there is a mask or dropout, whose addresses and random bits take registers of their own."""

SHARED_HEADS: dict[tuple[str, str], dict[int, Tile]] = {
    ("sm_90", "backward keys"): {
        64: Tile(64, 128, 8, 3, HOST),
        128: Tile(32, 128, 8, 3, HOST),
        256: Tile(16, 64, 8, 2, HOST),
    },
    ("sm_100", "backward keys"): {
        64: Tile(64, 128, 8, 2, HOST),
        128: Tile(64, 64, 8, 2, HOST),
        256: Tile(16, 64, 8, 1, HOST),
    },
    ("sm_80", "backward keys"): {
        64: Tile(32, 64, 8, 2),
        128: Tile(32, 64, 8, 2),
        256: Tile(16, 32, 8, 1),
    },
}
"""The same where query heads share a key head and the loop over them, which takes registers of its own, makes
the usual tile spill: on sm_90 with Triton 3.6.0 (heads of 64 and 128) or 3.9.0 (256), on sm_100 at 256, on
sm_80 at 64."""

EXACT: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(32, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
    "backward keys": {64: Tile(16, 64, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "backward queries": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
}
"""Kernel -> head dimension up to -> tile for float32, on every target.

Right, not fast: three products of the tensor cores' 19-bit format stand in for one of float32, and both
halves of whole operands lie in registers. On NVIDIA most of them spill at heads above 64, and none was
tuned.
"""

DECODE = {64: Tile(16, 128, 4, 2), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)}
"""Head dimension up to -> tile of the paged kernel on every target; its rows are heads of one key head."""


def candidates(head_dim: int, direction: str, target: str) -> tuple[Tile, ...]:
    """The tiles for 16-bit tensors without mask or dropout, the one that ``configuration`` gives first.

    Which is fastest only a GPU can say: ``gpu_forward.attention(..., tile=...)`` takes any of them.
    """
    return _up_to(TILES[target, direction], head_dim)


def configuration(
    head_dim: int,
    dtype: torch.dtype,
    direction: str,
    target: str,
    light: bool = False,
    grouped: bool = False,
) -> Tile:
    """The tile of a kernel ("forward", "backward keys", "backward queries", "decode"), from sizes alone.

    light: there is a mask or dropout. grouped: query heads share a key head.
    """
    precision = "ieee" if target == "gfx942" or dtype != torch.float32 else "tf32x3"
    if direction == "decode":
        return _up_to(DECODE, head_dim)._replace(precision=precision)
    if dtype == torch.float32:
        return _up_to(EXACT[direction], head_dim)._replace(precision=precision)
    if light:
        return _up_to(LIGHT[target, direction], head_dim)
    if grouped and (target, direction) in SHARED_HEADS:
        return _up_to(SHARED_HEADS[target, direction], head_dim)
    return candidates(head_dim, direction, target)[0]


def _up_to(rows: dict[int, Any], head_dim: int) -> Any:
    return next(row for largest, row in rows.items() if head_dim <= largest)


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
    # The stride of a dimension of one element means nothing and may be anything; the copy engine still
    # reads it.
    strides = [width if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, width])


def tile_for(direction: str, light: bool, *tensors: torch.Tensor) -> Tile:
    """``configuration`` for these tensors, the query first; pointers where no descriptor can be had of
    them."""
    dim, dtype, target = tensors[0].shape[-1], tensors[0].dtype, target_of(tensors[0])
    grouped = len({tensor.shape[-3] for tensor in tensors}) > 1
    tile = configuration(dim, dtype, direction, target, light, grouped)
    if tile.descriptors and not describable(*tensors):
        tile = configuration(dim, dtype, direction, "sm_80", light, grouped)
    return tile


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


def broadcast_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[Any, list[int], int]:
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


def natural(query: torch.Tensor) -> bool:
    """Whether scores keep the natural base (``NATURAL``, see gpu_scores)."""
    return query.dtype == torch.float32


def score_scale(scale: float, query: torch.Tensor) -> float:
    """What query . key is multiplied by to give scores in their base."""
    return scale if natural(query) else scale * math.log2(math.e)


def dropout_numbers(dropout_p: float, seed: int) -> tuple[float, int, int]:
    """(1 / share kept, seed, threshold): a weight is dropped where its 32 random bits are below the
    threshold."""
    keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return keep_scale, seed, min(round(dropout_p * 2**32), 2**32 - 1)
