"""Operations on tensors, on the CPU (numba) and the GPU (Triton), and what they share (simd, inspect).

``kernels.softmax``, ``kernels.layer_norm``, ... have ``torch.nn.functional``'s names, signatures and errors.
Each is loaded when it is first asked for: importing ``kernels`` loads neither torch nor numba.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "FallbackWarning": "kernels.op",
    "elu": "kernels.activation",
    "gelu": "kernels.activation",
    "leaky_relu": "kernels.activation",
    "relu": "kernels.activation",
    "rotary_embedding": "kernels.rotary",
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
