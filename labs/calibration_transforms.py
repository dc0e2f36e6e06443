"""What a transformed program costs beside its arithmetic: dispatch, kernels, compiling, torch.func.

Used by ``labs.calibration``. Programs are chains of negations and of products that no lab runs, so that no
constant comes from the operation it predicts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from labs.calibration_hardware import Figures, best, typical

OPERATIONS = 16  # of a chain: what the chain adds to one of them is divided by so many
LONGER = 8  # steps of the longer of two programs whose compilation is compared
REST_S = 2e-3  # longer than XLA's idle threads spin
TURNS, KERNELS_OF_A_TURN = 512, 3
SIDE = 320  # of the product whose rate is taken: in cache, and many times a call's own cost
PRODUCT_SIDES = (16, 64, 320, 1024)  # a call, in the nearest cache, in a core's own, past it
NUMPY_SIDES = (8, 48)  # with fewer multiplications than OpenBLAS shares out
LONGEST_PRODUCT_S = 0.05
THIN = 64, 1024, 4096  # rows, inputs, outputs
PRODUCT_S = 2e-3  # of a timed run of products


def _per_call(
    step: Callable[[], object], count: int, wait: Callable[[Any], object] = lambda output: None
) -> float:
    """Seconds of one call among ``count`` in a row; ``wait`` is called on the last output."""

    def many() -> None:
        for _ in range(count):
            output = step()
        wait(output)

    return typical(many, 9) / count


def _rested_call(step: Callable[[], object], count: int = 25) -> float:
    """Median seconds of a call whose thread of XLA's has gone to sleep."""
    seconds = []
    for _ in range(count):
        time.sleep(REST_S)
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def jax_programs() -> Figures:
    """Dispatch of jitted programs, kernels inside one, and compiling them."""
    import jax
    import jax.numpy as jnp

    wait = jax.block_until_ready
    device = jax.devices("cpu")[0]
    one: Any = jax.device_put(jnp.float32(1.0), device)
    some: Any = jax.device_put(jnp.linspace(0.0, 1.0, 4096), device)
    negate = jax.jit(lambda x: -x)
    call = _per_call(lambda: negate(one), 300, wait)
    handed = _per_call(lambda: negate(some), 100, wait)
    waited = _per_call(lambda: negate(some).block_until_ready(), 50)
    answered = _per_call(lambda: negate(one).block_until_ready(), 200)
    woken = _rested_call(lambda: negate(some).block_until_ready())
    several = jax.jit(lambda items: [-item for item in items])
    items = [one] * OPERATIONS
    arrays = _per_call(lambda: several(items), 50, wait)
    vector = jnp.linspace(0.0, 1.0, 64)[None]
    short, long = _compile_seconds(1), _compile_seconds(LONGER)
    each = max(long - short, 0.0) / (LONGER - 1)
    eye = jnp.eye(vector.shape[1])
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, TURNS, lambda turn, x: jnp.cos(x @ eye), x))
    turn = typical(lambda: wait(loop(vector)), 9) / TURNS
    square = jnp.linspace(-1.0, 1.0, SIDE * SIDE).reshape(SIDE, SIDE)
    product = jax.jit(lambda a, b: a @ b)
    seconds = best(lambda: wait(product(square, square)), 9)
    return {
        "jax_array_s": (
            max(arrays - call, 0.0) / (OPERATIONS - 1),
            f"jitted negation of {OPERATIONS} scalars, less that of one: an array more, in and out",
        ),
        "jax_handover_s": (
            max(handed - call, 0.0),
            "jitted negation of 4096 elements, less that of a scalar: XLA runs a program of 1000 "
            "FLOPs or more on another thread; calls in a row, one wait at the end",
        ),
        "jax_wait_s": (
            max(waited - answered, 0.0),
            "the same two with a wait after each call: handing over and being woken",
        ),
        "jax_wake_s": (
            max(woken - answered, 0.0),
            f"the same, {1e3 * REST_S:g} ms of rest before each call: XLA's thread sleeps and is woken",
        ),
        "jax_kernel_s": (
            turn / KERNELS_OF_A_TURN,
            f"a jitted fori_loop of {TURNS} turns of cos(x @ w), 64 elements, over its 3 kernels a turn",
        ),
        "jax_compile_s": (
            max(short - each, short / 2),
            "XLA's compilation of (x @ w) * 1.5, its one kernel taken off",
        ),
        "jax_compile_kernel_s": (
            each,
            f"compiling {LONGER} such steps, each with a factor and so a kernel of its own, less one",
        ),
        "jax_matmul_flops": (
            2 * SIDE**3 / seconds,
            f"jitted product of two {SIDE} x {SIDE} matrices, all cores",
        ),
    }


def _several(x: Any) -> Any:
    import torch

    several = (torch.neg, torch.sin, torch.sinh, torch.expm1)  # of one or two operations in backward
    for place in range(OPERATIONS):
        x = several[place % len(several)](x)
    return x


def _compile_seconds(length: int) -> float:
    """Seconds of compiling a chain of (x @ w) * number: products are a library's, multiplications kernels."""
    import jax
    import jax.numpy as jnp

    def chain(x: Any, w: Any) -> Any:
        for step in range(length):
            x = (x @ w) * (step + 1.5)
        return x

    lowered = jax.jit(chain).lower(jnp.ones((16, 64)), jnp.eye(64))
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def torch_programs() -> Figures:
    """An operation under ``torch.func``; the rate of a product."""
    import torch

    plain = torch.ones(4, 1)
    transformed = torch.func.vmap(torch.func.grad(lambda x: _several(x).sum()))
    single = torch.func.vmap(torch.func.grad(lambda x: (-x).sum()))
    many, one = _per_call(lambda: transformed(plain), 5), _per_call(lambda: single(plain), 5)
    each = max(many - one, 0.0) / (OPERATIONS - 1)
    return {
        "torch_custom_call_s": (_custom_call(), "a custom operator of one element that clones it"),
        "torch_func_call_s": (
            each,
            f"torch.func.vmap(grad(...)) of {OPERATIONS} operations, less that of one, per operation",
        ),
        "torch_func_entry_s": (max(one - each, 0.0), "the same of one operation, less that"),
    }


@cache
def _custom_operator() -> Callable[[Any], Any]:
    """Registered once a process."""
    import torch

    def clone(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    clone.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}  # as objects, not as text
    return torch.library.custom_op("perflab_calibration::clone", clone, mutates_args=())


def _custom_call() -> float:
    import torch

    operator, one = _custom_operator(), torch.ones(1)
    return _per_call(lambda: operator(one), 100)


def torch_products() -> Figures:
    """Rates of the library's products over their size, by type, of one thread and of all."""
    import torch

    before = torch.get_num_threads()
    found: Figures = {}
    try:
        for suffix, threads in {"1": 1, "all": before}.items():
            torch.set_num_threads(threads)
            for name in ("float32", "bfloat16"):
                dtype = getattr(torch, name)

                def seconds(side: int, dtype: Any = dtype) -> float:
                    square = torch.linspace(-1.0, 1.0, side * side).reshape(side, side).to(dtype)
                    out = torch.empty_like(square)
                    return _product_seconds(lambda: torch.mm(square, square, out=out))

                whole, last = 0.0, 1
                for side in PRODUCT_SIDES:
                    if whole * (side / last) ** 3 > LONGEST_PRODUCT_S:
                        break  # in a type that this CPU has no units for
                    whole, last = seconds(side), side
                    found[f"torch_product_{side}_{name}_{suffix}_flops"] = (
                        2 * side**3 / whole,
                        f"torch.mm of two {side} x {side} matrices of {name}, {threads} thread(s)",
                    )
    finally:
        torch.set_num_threads(before)
    return found


def thin_products() -> Figures:
    """Rates of products of a few rows with weights past a core's caches, each used so few times that bringing
    it into the order that the library multiplies in is part of it."""
    import torch

    rows, size, columns = THIN
    found: Figures = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        x = torch.linspace(-1.0, 1.0, rows * size).reshape(rows, size).to(dtype)
        weight = torch.linspace(-1.0, 1.0, columns * size).reshape(columns, size).to(dtype)
        product = partial(torch.nn.functional.linear, x, weight)
        seconds = best(product, 1)
        if seconds < LONGEST_PRODUCT_S:
            seconds = best(product, 5)
        found[f"torch_thin_product_{name}_all_flops"] = (
            2.0 * rows * size * columns / seconds,
            f"torch's linear of {rows} rows with a {columns} x {size} weight of {name}, all cores",
        )
    return found


def numpy_products() -> Figures:
    """The same of NumPy's library: small ones, which it leaves to one thread, and larger ones."""
    import numpy

    def seconds(side: int) -> float:
        square = numpy.linspace(-1.0, 1.0, side * side, dtype=numpy.float32).reshape(side, side)
        out = numpy.empty_like(square)
        return _product_seconds(lambda: numpy.matmul(square, square, out=out))

    return {
        f"numpy_product_{side}_float32_{suffix}_flops": (
            2 * side**3 / seconds(side),
            f"numpy.matmul of two {side} x {side} matrices, its call included",
        )
        for side, suffix in (*((side, "1") for side in NUMPY_SIDES), (SIDE, "all"))
    }


def _product_seconds(product: Callable[[], object]) -> float:
    once = best(product, 3)
    many = max(1, int(PRODUCT_S / once))

    def products() -> None:
        for _ in range(many):
            product()

    return once if many == 1 else best(products, 5) / many
