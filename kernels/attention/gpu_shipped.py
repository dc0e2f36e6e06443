"""The attention kernels as shipped, for a compiler without a GPU: ``perflab inspect`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.ahead_of_time import TARGETS, Compilation
from kernels.attention.gpu_backward import delta_kernel
from kernels.attention.gpu_backward_keys import key_value_gradient_kernel
from kernels.attention.gpu_backward_queries import query_gradient_kernel
from kernels.attention.gpu_decode import combine_kernel, split_kernel
from kernels.attention.gpu_forward import attention_kernel
from kernels.attention.gpu_tiles import Tile, candidates, configuration, padded

_KERNELS = {
    "forward": attention_kernel,
    "backward keys": key_value_gradient_kernel,
    "backward queries": query_gradient_kernel,
}
_TYPES = {
    **dict.fromkeys(("log_sum_exp", "delta", "exponent", "exponents", "partial"), "*fp32!"),
    **dict.fromkeys(("block_table", "context_lengths"), "*i32!"),
    **dict.fromkeys(("scale", "final_scale", "keep_scale"), "fp32"),
    **dict.fromkeys(("seed", "threshold"), "i64"),
}
_TENSORS = {"query", "key", "value", "mask", "output", "grad", "key_cache", "value_cache"}


def _types(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """The Triton types of a kernel's arguments, as they are handed over on a GPU."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if constants.get("DESCRIPTORS") == "host" and name in ("query", "key", "value", "grad"):
            rows = constants["ROWS" if name in ("query", "grad") else "COLUMNS"]
            types[name] = f"tensordesc<{dtype}[1,1,{rows},{constants['WIDTH']}]>"
        elif name in _TENSORS or name.endswith("_gradient"):
            types[name] = f"*{dtype}!"
        else:
            types[name] = _TYPES.get(name, "i32!" if name.startswith("stride") else "i32")
    return types


def compilation(
    kernel: str,
    head_dim: int,
    tile: Tile,
    targets: tuple[str, ...],
    *,
    dtype: str = "bf16",
    causal: bool = True,
    window: bool = False,
    light: bool = False,
    grouped: bool = False,
) -> Compilation:
    """One kernel ("forward", "backward keys", "backward queries") with one tile.

    light: an added mask and dropout. grouped: several query heads share a key head.
    """
    constants: dict[str, Any] = {
        "HEAD": head_dim, "WIDTH": padded(head_dim), "ROWS": tile.rows, "COLUMNS": tile.columns,
        "CAUSAL": causal, "WINDOW": window, "MASK": 2 if light else 0, "DROPOUT": light,
        "DESCRIPTORS": tile.descriptors, "PRECISION": tile.precision, "NATURAL": dtype == "fp32",
        "SPLIT": not light,
    }  # fmt: skip
    if kernel == "backward keys":
        constants |= {"GROUPED": grouped, "SPLIT": not (light or grouped or window)}
    else:
        constants["EDGE"] = causal
    if kernel == "forward":
        constants |= {"SPECIALIZED": tile.specialized, "SPLIT": not (light or tile.specialized)}
    what = "window" if window else "causal" if causal else "full"
    extras = ", mask and dropout" * light + ", shared heads" * grouped
    label = (
        f"attention {kernel}, {dtype}, heads of {head_dim}, {what}{extras}: {tile.rows}x{tile.columns}, "
        f"{tile.warps} warps, {tile.stages} stages"
        + f", {tile.descriptors} descriptors"
        * bool(tile.descriptors)
    )
    return Compilation(
        label=label + ", specialised" * tile.specialized,
        kernel=_KERNELS[kernel],
        types=_types(_KERNELS[kernel], constants, dtype),
        constants=constants,
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        operation="scaled_dot_product_attention",
        direction="forward" if kernel == "forward" else "backward",
        matrix=True,
        specialized=tile.specialized,
        targets=targets,
    )


def compilations() -> list[Compilation]:
    """Every kernel for heads of 64, 128 and 256; for 128 also what is less usual."""
    return [*_attention(), *_decode()]


def _attention() -> Iterator[Compilation]:
    for kernel in _KERNELS:
        for head_dim in (64, 128, 256):
            for tile, targets in _by_tile(head_dim, kernel, light=False):
                yield compilation(kernel, head_dim, tile, targets)
                if head_dim == 128:
                    yield compilation(kernel, head_dim, tile, targets, causal=False)
                    yield compilation(kernel, head_dim, tile, targets, window=True)
            if kernel == "backward keys":
                for tile, targets in _by_tile(head_dim, kernel, light=False, grouped=True):
                    yield compilation(kernel, head_dim, tile, targets, grouped=True)
        for tile, targets in _by_tile(128, kernel, light=True):
            yield compilation(kernel, 128, tile, targets, light=True)
    for tile in candidates(128, "forward", "sm_90"):
        if tile.specialized:
            yield compilation("forward", 128, tile, ("sm_90",))
            yield compilation("forward", 128, tile, ("sm_90",), causal=False)


def _by_tile(
    head_dim: int, kernel: str, light: bool, grouped: bool = False
) -> list[tuple[Tile, tuple[str, ...]]]:
    """The tiles in use and the targets that use each."""
    found: dict[Tile, tuple[str, ...]] = {}
    for target in TARGETS:
        tile = configuration(head_dim, torch.bfloat16, kernel, target, light, grouped)
        found[tile] = (*found.get(tile, ()), target)
    return list(found.items())


def _decode() -> Iterator[Compilation]:
    for head_dim in (64, 128, 256):
        width = padded(head_dim)
        tile = configuration(head_dim, torch.bfloat16, "decode", "sm_90")
        for label, kernel, constants, matrix in (
            (
                f"paged decode, bf16, heads of {head_dim}",
                split_kernel,
                {
                    "HEAD": head_dim,
                    "WIDTH": width,
                    "GROUP": 16,
                    "COLUMNS": tile.columns,
                    "PRECISION": tile.precision,
                },
                True,
            ),
            (
                f"paged decode's combination, bf16, heads of {head_dim}",
                combine_kernel,
                {"HEAD": head_dim, "WIDTH": width, "SPLITS": 16},
                False,
            ),
        ):
            yield Compilation(
                label=label,
                kernel=kernel,
                types=_types(kernel, constants, "bf16"),
                constants=constants,
                options={"num_warps": tile.warps, "num_stages": tile.stages},
                operation="decode_attention",
                direction="forward",
                matrix=matrix,
            )
    constants = {"HEAD": 128, "WIDTH": 128, "ROWS": 64, "NATURAL": False}
    yield Compilation(
        label="attention backward delta, bf16, heads of 128",
        kernel=delta_kernel,
        types=_types(delta_kernel, constants, "bf16"),
        constants=constants,
        options={"num_warps": 4},
        operation="scaled_dot_product_attention",
        direction="backward",
    )
