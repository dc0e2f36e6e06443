"""Attention of some queries to some of the keys, with what merges it with the rest: the log-sum-exp.

Source: Milakov and Gimelshein 2018 "Online normalizer calculation for softmax"; Dao 2023 "FlashAttention-2",
sections 2.3 and 3.1. For queries q over the keys of one block b

    S_b = scale q K_b^T,   L_b = log sum exp(S_b),   O_b = exp(S_b - L_b) V_b

and over all blocks L = log sum_b exp(L_b), O = sum_b exp(L_b - L) O_b. Backward needs of the other blocks L
and O only:

    P_b = exp(S_b - L),   dV_b = P_b^T dO,   dS_b = P_b * (dO V_b^T - rowsum(dO * O))
    dQ += scale dS_b K_b,   dK_b = scale dS_b^T Q

``kernels.attention`` has both as operations for float32 and 16-bit tensors; float64 is plain torch, as above.
Shapes: query (batch, heads, n, dim), key and value (batch, kv_heads, m, dim), heads a multiple of kv_heads.
"""

from __future__ import annotations

import math

import torch

import kernels.attention  # registers torch.ops.perflab.attention
from kernels.op import FLOATS


def _kernel_takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    return (
        query.dtype in FLOATS
        and query.shape[-1] <= kernels.attention.LARGEST_HEAD
        and query.numel() > 0
        and key.numel() > 0
    )


def block_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O_b, L_b (batch, heads, n)) in float32, in float64 for float64."""
    if _kernel_takes(query, key):
        contiguous = (tensor.contiguous() for tensor in (query, key, value))
        output, log_sum_exp = torch.ops.perflab.attention(*contiguous, None, 0.0, 0, is_causal, scale, 0)
        return output.float(), log_sum_exp
    scores = _scores(query, key, is_causal, scale)
    log_sum_exp = scores.logsumexp(-1)
    weights = scores.sub_(log_sum_exp.unsqueeze(-1)).exp_()
    output = weights @ value.to(weights.dtype).unsqueeze(2)
    return output.flatten(1, 2), log_sum_exp.flatten(1, 2)


def block_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dQ from this block, dK_b, dV_b), given dO, and O and L over all blocks."""
    if _kernel_takes(query, key):
        contiguous = [tensor.contiguous() for tensor in (grad, query, key, value)]
        return torch.ops.perflab.attention_backward(
            *contiguous, None, output.contiguous(), log_sum_exp.contiguous(), 0.0, 0, is_causal, scale, 0
        )
    kv_heads = key.shape[1]
    weights = _scores(query, key, is_causal, scale).sub_(_grouped(log_sum_exp, kv_heads).unsqueeze(-1)).exp_()
    wide = [_grouped(tensor.to(weights.dtype), kv_heads) for tensor in (grad, query, output)]
    grad, query, output = wide
    delta = (grad * output).sum(-1, keepdim=True)
    grad_value = (weights.transpose(-1, -2) @ grad).sum(2)
    grad_scores = weights.mul_((grad @ value.to(weights.dtype).unsqueeze(2).transpose(-1, -2)).sub_(delta))
    grad_query = scale * (grad_scores @ key.to(weights.dtype).unsqueeze(2))
    grad_key = scale * (grad_scores.transpose(-1, -2) @ query).sum(2)
    return grad_query.flatten(1, 2), grad_key, grad_value


def merge(
    output: torch.Tensor, log_sum_exp: torch.Tensor, part: torch.Tensor, part_log_sum_exp: torch.Tensor
) -> None:
    """Take one more block into (output, log_sum_exp), in place."""
    total = torch.logaddexp(log_sum_exp, part_log_sum_exp)
    output.mul_((log_sum_exp - total).exp_().unsqueeze(-1))
    output.add_(part.mul_((part_log_sum_exp - total).exp_().unsqueeze(-1)))
    log_sum_exp.copy_(total)


def _grouped(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return tensor.unflatten(1, (kv_heads, tensor.shape[1] // kv_heads))


def _scores(query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float) -> torch.Tensor:
    """(batch, kv_heads, heads of each, n, m), at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (_grouped(query.to(wide), key.shape[1]) @ key.to(wide).unsqueeze(2).transpose(-1, -2))
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(later, -math.inf)
    return scores
