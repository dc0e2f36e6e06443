"""Attention that never holds the scores, with torch's signature; and one query against a paged cache.

Sources: Dao et al. 2022 "FlashAttention" (tiles, recomputed scores in backward), Dao 2023 "FlashAttention-2"
(no rescaling but of the accumulator; parallel over queries), Milakov and Gimelshein 2018 (online softmax),
Kwon et al. 2023 "PagedAttention" (the block table), Beltagy et al. 2020 "Longformer" (the sliding window).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels import functional as F
from kernels.attention import cpu_backward, cpu_decode, cpu_forward, reference
from kernels.op import register, use_torch, warn_once

LARGEST_HEAD = 256
"""Elements of a head beyond which torch's own operation runs."""


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T + mask) value. As ``torch.nn.functional.scaled_dot_product_attention``.

    query: (..., heads, length, dim); key, value: (..., kv heads, keys, dim), with kv heads = heads, or a
    divisor of it with ``enable_gqa``. attn_mask: bool (True: take part) or added to the scores,
    broadcastable to (..., heads, length, keys). scale: 1 / sqrt(dim) by default. is_causal: query i sees
    keys 0 to i.

    window (not in torch): query i sees the keys i - window + 1 to i. A query that sees no key gives zeros,
    and its gradients are zeros. Dropout draws one seed from torch's generator, and each weight's fate from
    that.

    Errors are torch's; ValueError when ``window`` is below 1 or keys and values differ in number. Heads of
    more than 256 elements, a value whose head differs from the key's, a mask that takes a gradient and
    further dtypes run torch's own operation.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r} is not a number of keys; the least is 1, the query's own")
    if use_torch("scaled_dot_product_attention", query, key, value):
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window)
    reason = _not_taken(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is not None:
        if reason and not torch.compiler.is_compiling():
            warn_once("scaled_dot_product_attention", reason)
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window)
    shape = query.shape
    if query.dim() != 4:
        if attn_mask is not None and query.dim() > 4:
            attn_mask = attn_mask.expand(*shape[:-1], key.shape[-2]).reshape(-1, *shape[-3:-1], key.shape[-2])
        query, key, value = (_four_dimensions(tensor) for tensor in (query, key, value))
    mask = None
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask = mask.expand(-1, -1, -1, key.shape[-2]).contiguous()
    output, _ = _attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        mask,
        float(dropout_p),
        int(torch.randint(2**31 - 1, ())) if dropout_p > 0 else 0,
        is_causal or window is not None,
        1 / math.sqrt(shape[-1]) if scale is None else float(scale),
        window or 0,
    )
    return output.view(shape)


def _four_dimensions(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 4:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.reshape(-1, *tensor.shape[-3:])


def _not_taken(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why torch's own operation runs; "" where that needs no warning (nothing to do, an error); or None."""
    size, key_size = query.shape, key.shape
    if query.dim() < 2 or not query.dim() == key.dim() == value.dim() or not 0 <= dropout_p < 1:
        return ""
    if 0 in size or 0 in key_size or query.dtype != key.dtype or query.dtype != value.dtype:
        return ""
    if key_size[-2] != value.shape[-2]:
        raise ValueError(
            f"there are {key_size[-2]} keys but {value.shape[-2]} values; each key has its value"
        )
    if size[-1] != key_size[-1] or (is_causal and mask is not None):
        return ""
    if value.shape[-1] != size[-1]:
        return f"the value's head has {value.shape[-1]} elements, the key's {size[-1]}"
    if size[-1] > LARGEST_HEAD:
        return _too_wide(size[-1])
    if key_size != value.shape or size[:-3] != key_size[:-3]:
        return "the kernels do not broadcast batches"
    if query.dim() > 2 and size[-3] != key_size[-3]:
        if not enable_gqa:
            return "the kernels do not broadcast heads without enable_gqa"
        if size[-3] % key_size[-3]:
            return ""
    if mask is not None:
        if mask.requires_grad:
            return "the mask takes a gradient"
        if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
            return ""
        full = (*size[:-1], key_size[-2])
        if not 2 <= mask.dim() <= query.dim() or any(
            have not in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False)
        ):
            return ""
    if dropout_p > 0 and torch.compiler.is_compiling():
        return ""  # a seed drawn as a number would break the graph
    return None


def _torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: int | None,
) -> torch.Tensor:
    """torch's own operation; the window becomes a mask."""
    if window is not None:
        seen = reference.band(query.shape[-2], key.shape[-2], True, window, query.device)
        if attn_mask is None:
            attn_mask = seen
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & seen
        else:
            attn_mask = torch.where(seen, attn_mask, -math.inf)
        is_causal = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _too_wide(dim: int) -> str:
    return f"the kernels take heads of up to {LARGEST_HEAD} elements, not {dim}"


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """One query a sequence against its keys and values in a paged cache: (sequences, heads, dim).

    query: (sequences, heads, dim). key_cache, value_cache: (blocks, block_size, kv_heads, dim) of the same
    dtype, kv_heads a divisor of heads. block_table: (sequences, max_blocks) int32, key j of sequence s lies
    in block block_table[s, j // block_size] at place j % block_size. context_lengths: (sequences,) int32,
    how many keys the sequence has; 0 gives zeros. scale: 1 / sqrt(dim) by default. There is no gradient.

    ValueError: shapes that do not fit, a length beyond the table's row, a block that the cache does not have
    (looked up on the CPU only; reading them on a GPU would stop its stream, so that there a bad table reads
    nothing outside the cache but gives no error). TypeError: tables that are not int32.
    """
    if query.dim() != 3 or key_cache.dim() != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            "query is (sequences, heads, dim), both caches (blocks, block_size, kv_heads, dim); got "
            f"{tuple(query.shape)}, {tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        )
    sequences, heads, dim = query.shape
    if key_cache.shape[3] != dim or key_cache.shape[2] < 1 or heads % key_cache.shape[2]:
        raise ValueError(
            f"the caches hold {key_cache.shape[2]} heads of {key_cache.shape[3]} elements, which does not "
            f"serve queries of {heads} heads of {dim}: dim must agree and kv_heads divide heads"
        )
    if block_table.dim() != 2 or len(block_table) != sequences or context_lengths.shape != (sequences,):
        raise ValueError(
            f"block_table is ({sequences}, max_blocks) and context_lengths ({sequences},) for a query of "
            f"{sequences} sequences; got {tuple(block_table.shape)} and {tuple(context_lengths.shape)}"
        )
    if block_table.dtype != torch.int32 or context_lengths.dtype != torch.int32:
        raise TypeError(
            f"block_table and context_lengths are int32, not {block_table.dtype} and {context_lengths.dtype}"
        )
    if query.dtype != key_cache.dtype or query.dtype != value_cache.dtype:
        raise TypeError(
            f"query and caches have one dtype, not {query.dtype}, {key_cache.dtype} and {value_cache.dtype}"
        )
    scale = 1 / math.sqrt(dim) if scale is None else float(scale)
    small_or_not_taken = use_torch("decode_attention", query, key_cache, value_cache)
    if dim > LARGEST_HEAD and not torch.compiler.is_compiling():
        warn_once("decode_attention", _too_wide(dim))
    if small_or_not_taken or dim > LARGEST_HEAD:
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            cpu_decode.check_tables(block_table, context_lengths, *key_cache.shape[:2])
        return reference.decode_attention(query, key_cache, value_cache, block_table, context_lengths, scale)
    return _decode_attention(
        query.contiguous(),
        key_cache.contiguous(),
        value_cache.contiguous(),
        block_table.contiguous(),
        context_lengths.contiguous(),
        scale,
    )


# --- registration --------------------------------------------------------------------------------


def _fake(query: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, mask, *numbers = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, None, None, None, None, None, None)


_attention_backward = register(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor output, "
    "Tensor log_sum_exp, float dropout_p, int seed, bool is_causal, float scale, int window) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu_backward.attention_backward,
    cuda="kernels.attention.gpu_backward:attention_backward",
    fake=lambda grad, query, key, value, *_: tuple(map(torch.empty_like, (query, key, value))),
)
_attention = register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout_p, int seed, "
    "bool is_causal, float scale, int window) -> (Tensor, Tensor)",
    cpu=cpu_forward.attention,
    cuda="kernels.attention.gpu_forward:attention",
    fake=_fake,
    setup_context=_keep,
    backward=_backward,
)
_decode_attention = register(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
    "Tensor context_lengths, float scale) -> Tensor",
    cpu=cpu_decode.decode_attention,
    cuda="kernels.attention.gpu_decode:decode_attention",
    fake=lambda query, *_: torch.empty_like(query),
)
