"""Operations on tensors, on the CPU (numba) and the GPU (Triton), and what they share (simd, inspect).

``kernels.softmax``, ``kernels.layer_norm``, ... have ``torch.nn.functional``'s names, signatures and errors.
Each is loaded when it is first asked for: importing ``kernels`` loads neither torch nor numba.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "FallbackWarning": "kernels.op",
    "Adadelta": "kernels.optimizer",
    "Adagrad": "kernels.optimizer",
    "Adam": "kernels.optimizer",
    "AdamW": "kernels.optimizer",
    "RMSprop": "kernels.optimizer",
    "SGD": "kernels.optimizer",
    "add_layer_norm": "kernels.normalization",
    "add_rms_norm": "kernels.normalization",
    "cross_entropy": "kernels.loss",
    "decode_attention": "kernels.attention",
    "elu": "kernels.activation",
    "gelu": "kernels.activation",
    "layer_norm": "kernels.normalization",
    "leaky_relu": "kernels.activation",
    "linear_cross_entropy": "kernels.loss",
    "linear_int4": "kernels.matmul",
    "linear_int8": "kernels.matmul",
    "matmul_bf16": "kernels.matmul",
    "quantize_int4": "kernels.matmul",
    "quantize_int8": "kernels.matmul",
    "relu": "kernels.activation",
    "rms_norm": "kernels.normalization",
    "rotary_embedding": "kernels.rotary",
    "scaled_dot_product_attention": "kernels.attention",
    "sigmoid": "kernels.activation",
    "silu": "kernels.activation",
    "softmax": "kernels.activation",
    "softplus": "kernels.activation",
    "swiglu": "kernels.activation",
    "tanh": "kernels.activation",
}
"""Public name -> module."""

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
