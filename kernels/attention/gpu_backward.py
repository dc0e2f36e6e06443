"""Attention backward in Triton: FlashAttention-2's (Dao 2023, arXiv 2307.08691) in three kernels.

With P = exp(S - log_sum_exp), dP = dO V^T and delta = rowsum(O * dO):

    dV = P^T dO        dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

One kernel computes delta, one dK and dV (``gpu_backward_keys.py``), one dQ (``gpu_backward_queries.py``). The
scores are computed in both, seven products instead of five, and in return nothing is added atomically: the
same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention.gpu_backward_keys import key_value_gradient_kernel
from kernels.attention.gpu_backward_queries import query_gradient_kernel
from kernels.attention.gpu_scores import LOG2_E, load_tile
from kernels.attention.gpu_tiles import (
    Tile,
    broadcast_mask,
    dropout_numbers,
    handed,
    natural,
    padded,
    score_scale,
    tile_for,
    unit_stride,
)

LARGEST_TILE = 128
"""Queries of the largest tile: the lengths of delta and exponents are padded to a multiple."""


@triton.jit(do_not_specialize=["query_length"])
def delta_kernel(
    output, grad, log_sum_exp, delta, exponent, heads, query_length, padded_length,
    stride_output_batch, stride_output_head, stride_output_row,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(output * grad) and exponent = log_sum_exp in the scores' base, both (batch, heads,
    padded length).

    The exponent of rows that saw nothing or do not exist is +inf, which makes all their weights zero; the
    other kernels then need no bounds on queries.
    """
    tiles = padded_length // ROWS
    program = tl.program_id(0)
    start = program % tiles * ROWS
    batch = program // tiles // heads
    head = program // tiles % heads
    output_tile = load_tile(
        output, batch, head, start, query_length, stride_output_batch, stride_output_head, stride_output_row,
        ROWS, HEAD, WIDTH, "", True,
    )  # fmt: skip
    grad_tile = load_tile(
        grad, batch, head, start, query_length, stride_grad_batch, stride_grad_head, stride_grad_row,
        ROWS, HEAD, WIDTH, "", True,
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    row = (batch * heads + head).to(tl.int64)
    tl.store(
        delta + row * padded_length + rows, tl.sum(output_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    )
    sums = tl.load(log_sum_exp + row * query_length + rows, mask=rows < query_length, other=float("inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums)
    if not NATURAL:
        sums *= LOG2_E
    tl.store(exponent + row * padded_length + rows, sums)


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    dropout_p: float,
    seed: int,
    is_causal: bool,
    scale: float,
    window: int,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, from ``gpu_forward.attention``'s arguments and outputs.

    tiles: others than ``configuration``'s for keys with values and for queries, to compare them.
    """
    if scale < 0:
        query_gradient, *others = attention_backward(
            grad, -query, key, value, mask, output, log_sum_exp, dropout_p, seed, is_causal, -scale,
            window, tiles
        )  # fmt: skip
        return (-query_gradient, *others)
    grad, query, key, value, output = (unit_stride(tensor) for tensor in (grad, query, key, value, output))
    batch, heads, length, dim = query.shape
    key_heads, keys = key.shape[1:3]
    gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
    if not query.numel() or not key.numel():
        return tuple(gradient.zero_() for gradient in gradients)
    query_gradient, key_gradient, value_gradient = gradients
    causal, grouped, split = is_causal or window > 0, heads != key_heads, mask is None and dropout_p == 0
    key_tile, query_tile = tiles or (
        tile_for(direction, not split, query, key, value, grad)
        for direction in ("backward keys", "backward queries")
    )
    padded_length = triton.cdiv(length, LARGEST_TILE) * LARGEST_TILE
    delta, exponents = log_sum_exp.new_empty((2, batch, heads, padded_length))
    rows = 64
    delta_kernel[(padded_length // rows * heads * batch,)](
        output, grad, log_sum_exp, delta, exponents, heads, length, padded_length,
        *output.stride()[:3], *grad.stride()[:3],
        HEAD=dim, WIDTH=padded(dim), ROWS=rows, NATURAL=natural(query), num_warps=4,
    )  # fmt: skip

    mask_source, mask_strides, mask_kind = broadcast_mask(mask, query, key)
    numbers = (
        score_scale(scale, query), scale, *dropout_numbers(dropout_p, seed), heads, heads // key_heads,
        length, padded_length, keys, window, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *mask_strides,
        *grad.stride()[:3],
    )  # fmt: skip
    switches: dict[str, Any] = {
        "HEAD": dim, "WIDTH": padded(dim), "CAUSAL": causal, "WINDOW": window > 0, "MASK": mask_kind,
        "DROPOUT": dropout_p > 0,
    }  # fmt: skip
    tile = key_tile
    (queries, grads, *others), descriptors = handed(
        (query, grad, key, value), (tile.rows, tile.rows, tile.columns, tile.columns), tile
    )
    key_value_gradient_kernel[(triton.cdiv(keys, tile.columns) * key_heads * batch,)](
        queries, *others, mask_source, grads, exponents, delta, key_gradient, value_gradient,
        *numbers, *key_gradient.stride()[:3], *value_gradient.stride()[:3], **switches,
        GROUPED=grouped, SPLIT=split and not grouped and not window, ROWS=tile.rows, COLUMNS=tile.columns,
        DESCRIPTORS=descriptors, PRECISION=tile.precision, NATURAL=natural(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = query_tile
    (queries, grads, *others), descriptors = handed(
        (query, grad, key, value), (tile.rows, tile.rows, tile.columns, tile.columns), tile
    )
    query_gradient_kernel[(triton.cdiv(length, tile.rows) * heads * batch,)](
        queries, *others, mask_source, grads, exponents, delta, query_gradient,
        *numbers, *query_gradient.stride()[:3], **switches,
        EDGE=causal or keys % tile.columns != 0, SPLIT=split,
        ROWS=tile.rows, COLUMNS=tile.columns, DESCRIPTORS=descriptors, PRECISION=tile.precision,
        NATURAL=natural(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return query_gradient, key_gradient, value_gradient
