"""``kernels.simd`` against the best peers: the elementwise functions, in cache, on one thread each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.plugin import Paired

ELEMENTS = 1 << 16  # 256 KiB of float32: in the second-level cache


@pytest.mark.parametrize("name", ["exp", "tanh", "erf"])
def test_elementwise(paired: Paired, name: str, pytestconfig: pytest.Config) -> None:
    """The loop over ``kernels.simd`` computes what float64 says; its time beside torch's and NumPy's."""
    import torch
    from numba import njit

    from kernels import simd

    function = getattr(simd, f"{name}_float32")

    @njit(error_model="numpy")
    def ours(x: Any, out: Any) -> None:
        simd.full_width()
        for i in range(x.size):
            out[i] = function(x[i])

    x = np.random.default_rng(0).uniform(-5, 5, ELEMENTS).astype(np.float32)
    out = np.empty_like(x)
    tensor, result = torch.from_numpy(x), torch.empty(ELEMENTS)
    peer = getattr(torch, name)
    ours(x, out)
    exact = peer(tensor.double()).numpy()
    assert np.max(np.abs(out - exact) / np.maximum(np.abs(exact), 1e-3)) < 5e-7

    functions: dict[str, Any] = {"torch": lambda: peer(tensor, out=result)}
    if name != "erf":  # NumPy has none
        functions["numpy"] = lambda: getattr(np, name)(x, out=out)
    seconds = {"quick": 0.5, "full": 5.0}.get(pytestconfig.getoption("perflab_scale"), 2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        paired(**functions, simd=lambda: ours(x, out), seconds=seconds * (len(functions) + 1))
    finally:
        torch.set_num_threads(threads)
