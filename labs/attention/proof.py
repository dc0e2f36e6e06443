"""Proof: every way against softmax(Q K^T / sqrt(D)) V in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

from labs.attention.config import Config
from labs.attention.counts import key_heads
from labs.attention.inputs import qkv, quantized, token
from labs.attention.ways import mask_of, naive
from labs.lab import Check

EPSILON = 2.0**-23


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """The largest error of each output.

    Tolerance in float32: a score is a sum of D products of size |q| |k|, rounded with error D eps / 2 at most
    and in practice with its root; exp turns an absolute error into a relative one; V's sum adds its own. The
    8-bit cache may add what its steps allow (``int8_bound``).
    """
    import torch

    found = []
    references: dict[str, torch.Tensor] = {}
    for address, output in outputs.items():
        group, _, name = address.partition("/")
        kind, _, size = group.rpartition("_")
        length = int(size)
        if group not in references:
            references[group] = _reference(config, kind, length)
        exact = references[group]
        if not isinstance(output, torch.Tensor) or output.shape != exact.shape:
            raise TypeError(f"{address} returned no tensor of shape {tuple(exact.shape)}")
        error = float((output.detach().double() - exact).abs().max())
        tolerance = 16 * EPSILON * math.sqrt(config.dim) * float(exact.abs().max())
        if name == "cache_int8":
            tolerance += int8_bound(config, length)
        found.append(Check(address, error, tolerance, "the formula in float64"))
    return found


def _reference(config: Config, kind: str, length: int):  # type: ignore[no-untyped-def]
    import torch

    if kind == "token":
        query, keys, values = (tensor.double() for tensor in token(config, length))
        repeats = config.heads // config.shared_heads
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        return naive(query[:, :, None], keys, values)[:, :, 0]
    query, key, value = (tensor.double() for tensor in qkv(config, length, key_heads(config, kind)))
    mask = mask_of(kind, length, config.window)
    repeats = config.heads // key.shape[1]
    out = torch.empty_like(query)
    for head in range(config.heads):  # one head's scores at a time
        one = slice(head, head + 1)
        shared = slice(head // repeats, head // repeats + 1)
        out[:, one] = naive(query[:, one], key[:, shared], value[:, shared], mask)
    return out


def int8_bound(config: Config, length: int) -> float:
    """How far an 8-bit cache may move the result.

    A number is off by half a step at most. A score then is off by delta = sum |q| step_k / 2 / sqrt(D), a
    weight by the factor exp(2 delta) at most, and the value by half its step.
    """
    query, keys, values = token(config, length)
    (_, key_step), (_, value_step) = quantized(keys), quantized(values)
    delta = float(query.abs().sum(-1).max() * key_step.max()) / 2 / math.sqrt(config.dim)
    return (math.exp(2 * delta) - 1) * float(values.abs().max()) + float(value_step.max()) / 2
