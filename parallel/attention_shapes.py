"""Whether query, key and value fit together, here and between ranks, and how long every rank's shard is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from kernels.op import FLOATS_AND_DOUBLE
from parallel.agreement import exchange
from parallel.tensor_regions import Group

EXCHANGED = 8
"""Numbers in which a rank describes its shapes."""


def checked_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    lengths: Sequence[int] | None,
    group: Group,
) -> list[int]:
    """Every rank's length of sequence. ValueError: arguments that do not fit, here or between ranks."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    wrong = _wrong(query, key, value, attn_mask, dropout_p, enable_gqa)
    if lengths is None:
        # A rank whose own arguments do not fit says so to the others, so that none is left waiting.
        own = [0] * EXCHANGED
        if not wrong:
            batch, heads, length, dim = query.shape
            code = FLOATS_AND_DOUBLE.index(query.dtype)
            own = [1, length, batch, heads, key.shape[1], dim, code, int(is_causal)]
        rows = exchange(own, query.device, group)
        bad = [other for other, row in enumerate(rows) if not row[0]]
        if not wrong and bad:
            wrong = f"query, key and value do not fit on rank {bad[0]}, which says how"
        elif not wrong and any(row[2:] != rows[0][2:] for row in rows):
            wrong = "batch, heads, kv_heads, dim, dtype and is_causal differ between ranks: " + "; ".join(
                f"rank {other} has {tuple(row[2:6])} {FLOATS_AND_DOUBLE[row[6]]}, {bool(row[7])}"
                for other, row in enumerate(rows)
            )
        lengths = [row[1] for row in rows]
    if wrong:
        raise ValueError(wrong)
    if len(lengths) != world or lengths[rank] != query.shape[2]:
        raise ValueError(
            f"lengths={list(lengths)} are not those of {world} ranks of which rank {rank} has "
            f"{query.shape[2]}"
        )
    return list(lengths)


def _wrong(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str:
    """What does not fit together in the arguments of one rank, or nothing."""
    if attn_mask is not None or dropout_p:
        return f"a mask or dropout (dropout_p={dropout_p}) has no form over ranks; is_causal has"
    fits = query.dim() == 4 == key.dim() and key.shape == value.shape and key.shape[1] > 0
    fits = fits and query.shape[::2] == key.shape[::2] and query.shape[3] == key.shape[3]
    fits = fits and query.shape[1] % key.shape[1] == 0 and (enable_gqa or query.shape[1] == key.shape[1])
    fits = fits and query.dtype == key.dtype == value.dtype and query.dtype in FLOATS_AND_DOUBLE
    if fits:
        return ""
    return (
        f"query {tuple(query.shape)} {query.dtype}, key {tuple(key.shape)} {key.dtype} and value "
        f"{tuple(value.shape)} {value.dtype} do not fit: query is (batch, heads, n, dim), key and value are "
        "(batch, kv_heads, n, dim) of one float dtype, kv_heads is heads, or with enable_gqa a divisor of it"
    )
