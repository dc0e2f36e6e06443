"""What one step of software costs: an interpreted operation, a library call, a hand-over between threads.

Used by ``labs.calibration``. Each loop's own cost is measured empty and taken off. The operations timed
here (``negative``, ``neg``) are in no lab: a constant never comes from the operation it predicts.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from typing import Any

from labs.calibration_hardware import Figures, typical

COUNT = 20_000


# --- the interpreter -------------------------------------------------------------------------------


def _loop_empty(values: list[float]) -> None:
    for _ in range(COUNT):
        pass


def _loop_arithmetic(values: list[float]) -> None:
    x, factor, addend = 1.5, 0.999, 0.001
    for _ in range(COUNT):
        x = x * factor + addend
        x = x * factor + addend
        x = x * factor + addend
        x = x * factor + addend


def _loop_items(values: list[float]) -> None:
    place = 3
    for _ in range(COUNT):
        values[place]
        values[place]
        values[place]
        values[place]


def _nothing() -> None:
    pass


def _loop_calls(values: list[float]) -> None:
    for _ in range(COUNT):
        _nothing()


def python_operation() -> float:
    """Seconds of one float multiplication or addition in a plain loop (recheck anchor)."""
    return (typical(lambda: _loop_arithmetic([])) - typical(lambda: _loop_empty([]))) / (8 * COUNT)


def python() -> Figures:
    values = [float(place) for place in range(10)]
    empty = typical(lambda: _loop_empty(values))
    return {
        "python_operation_s": (
            python_operation(),
            "x * a + b on floats in a for loop, loads and stores included",
        ),
        "python_call_s": (
            (typical(lambda: _loop_calls(values)) - empty) / COUNT,
            "calling an empty function of no arguments, loop taken off",
        ),
        "python_item_s": (
            (typical(lambda: _loop_items(values)) - empty) / (4 * COUNT),
            "indexing a list, loop taken off",
        ),
    }


def _per_call(step: Callable[[], object], count: int = 2_000) -> float:
    """Seconds of one call from a Python loop; the loop itself (some 20 ns) stays in."""

    def many() -> None:
        for _ in range(count):
            step()

    return typical(many) / count


# --- libraries -------------------------------------------------------------------------------------


def compiled() -> Figures:
    """numpy and numba."""
    import numpy

    from kernels import peaks as kernel
    from labs.machine import usable_cores

    one = numpy.ones(1, numpy.float32)
    block = numpy.random.default_rng(0).random(4096, dtype=numpy.float32)
    out = numpy.empty_like(block)
    cores = numpy.ones(usable_cores(), numpy.float32)
    matrix = numpy.ones((1, 1), numpy.float32)
    numpy_call = _per_call(lambda: numpy.negative(one, out=one))
    numba_call = _per_call(lambda: kernel.call(one))
    region = typical(lambda: kernel.region(cores), 1000)
    exponential = _per_call(lambda: numpy.exp(block, out=out), 100)
    kernel.libm_exp(block, 1)
    # Rows that are no multiple of one another in memory: numpy starts its inner loop anew for each.
    rows = numpy.ones((4096, 16), numpy.float32)[:, :8]
    out_rows = numpy.empty((4096, 16), numpy.float32)[:, :8]
    by_row = _per_call(lambda: numpy.negative(rows, out=out_rows), 10)
    libm = typical(lambda: kernel.libm_exp(block, 10)) / (10 * block.size)
    return {
        "numpy_call_s": (numpy_call, "numpy.negative of one element with out="),
        "numpy_product_call_s": (
            _per_call(lambda: numpy.matmul(matrix, matrix)),
            "numpy.matmul of a 1 x 1 matrix, output allocated",
        ),
        "numpy_reduction_call_s": (
            _per_call(lambda: matrix.min(0)),
            "minimum of a 1 x 1 matrix over its first axis",
        ),
        "numpy_exp_s": (
            (exponential - numpy_call) / block.size,
            "numpy.exp, 4096 float32 in cache, per element",
        ),
        "numpy_inner_loop_s": (
            (by_row - numpy_call) / len(rows),
            "numpy.negative of 4096 strided rows of 8 elements with out=, per row",
        ),
        "numba_call_s": (numba_call, "njit function of one array that returns its first item"),
        "numba_parallel_region_s": (
            max(region - numba_call, 0.0),
            "njit(parallel=True) with one trivial iteration a core, call taken off",
        ),
        "libm_exp_s": (libm, "expf of 4096 float32 in cache from a compiled loop, per element"),
    }


def torch_calls() -> Figures:
    """Eager dispatch, and what splitting an operation over the intra-op threads adds."""
    import torch

    threads = torch.get_num_threads()
    grain = 32768  # at::internal::GRAIN_SIZE: smaller pieces are not split
    one = torch.ones(1)
    call = _per_call(lambda: torch.neg(one))
    figures: Figures = {
        "torch_call_s": (call, "torch.neg of one element, output allocated"),
        "torch_scalar_call_s": (
            _per_call(lambda: one - 0.5),
            "a Python number subtracted from a torch tensor of one element",
        ),
        "torch_module_call_s": (_module_call(), "calling torch.nn.Identity"),
        "torch_product_call_s": (_product_call(), "torch.bmm of one 8 x 8 matrix, output allocated"),
        "torch_recorded_call_s": (
            _recorded_call(),
            "torch.neg of one element that requires a gradient, forward and backward, 32 in a row",
        ),
    }
    if threads > 1:
        large = torch.rand(grain * threads)
        out = torch.empty_like(large)
        split = typical(lambda: torch.neg(large, out=out), 300)
        torch.set_num_threads(1)
        try:
            serial = typical(lambda: torch.neg(large, out=out), 100)
        finally:
            torch.set_num_threads(threads)
        cost = split - call - (serial - call) / threads
        figures["torch_parallel_region_s"] = (
            max(cost, 0.0),
            f"torch.neg of {grain} elements a thread: {threads} threads less a share of one thread's time",
        )
    return figures


def _module_call() -> float:
    import torch

    module, one = torch.nn.Identity(), torch.ones(1)
    return _per_call(lambda: module(one))


def _product_call() -> float:
    import torch

    one = torch.ones(1, 8, 8)  # smaller ones do not reach the library
    return _per_call(lambda: torch.bmm(one, one))


def _recorded_call(count: int = 32) -> float:
    import torch

    one = torch.ones(1, requires_grad=True)

    def there_and_back() -> None:
        value = one
        for _ in range(count):
            value = torch.neg(value)
        torch.autograd.grad(value, one)

    return _per_call(there_and_back, 50) / count


def jax_calls() -> Figures:
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: -x)
    one: Any = jax.device_put(1.0, jax.devices("cpu")[0])
    several = jnp.ones(2048, device=jax.devices("cpu")[0])
    return {
        "jax_call_s": (
            _per_call(lambda: step(one).block_until_ready(), 500),
            "jitted negation of a scalar, dispatch and block_until_ready",
        ),
        "jax_eager_call_s": (
            _dispatched_call(jnp.negative, jax.device_put(1.0, jax.devices("cpu")[0])),
            "jax.numpy.negative of a scalar, 32 in a row and one block_until_ready, per operation",
        ),
        "jax_eager_array_call_s": (
            _dispatched_call(jnp.negative, several),
            "jax.numpy.negative of 2048 float32, which XLA hands to a thread, 32 in a row, per operation",
        ),
        "jax_index_call_s": (_per_call(lambda: several[3], 200), "item 3 of a JAX array of 2048"),
        "jax_recorded_call_s": (
            _jax_recorded_call(),
            "jax.value_and_grad, not jitted, of 16 jax.numpy.negative of a scalar, per operation",
        ),
        "jax_product_call_s": (
            _jax_product_call(),
            "lax.fori_loop of 1000 products of 8 x 8 matrices under jit, per step",
        ),
    }


def _dispatched_call(operation: Callable[[Any], Any], one: Any, count: int = 32) -> float:
    def in_a_row() -> None:
        value = one
        for _ in range(count):
            value = operation(value)
        value.block_until_ready()

    return _per_call(in_a_row, 50) / count


def _jax_recorded_call(count: int = 16) -> float:
    import jax
    import jax.numpy as jnp

    def in_a_row(value: Any) -> Any:
        for _ in range(count):
            value = jnp.negative(value)
        return value

    one: Any = jax.device_put(1.0, jax.devices("cpu")[0])
    recorded = jax.value_and_grad(in_a_row)
    return typical(lambda: jax.block_until_ready(recorded(one)), 15) / count


def _jax_product_call(count: int = 1000) -> float:
    """XLA replaces a loop of one elementwise operation by a formula or a kernel of its own; not this one."""
    import jax
    import jax.numpy as jnp

    one = jnp.eye(8, device=jax.devices("cpu")[0])
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda place, value: value @ x, x))
    return typical(lambda: loop(one).block_until_ready(), 30) / count


# --- threads and pickling --------------------------------------------------------------------------


def threads() -> Figures:
    def start_and_join() -> None:
        thread = threading.Thread(target=_nothing)
        thread.start()
        thread.join()

    return {
        "thread_start_s": (_per_call(start_and_join, 100), "start and join of a thread that does nothing"),
        "thread_switch_s": (_hand_over(), "one way between two threads through queue.SimpleQueue"),
    }


def _hand_over(count: int = 500) -> float:
    there: queue.SimpleQueue[bool] = queue.SimpleQueue()
    back: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def echo() -> None:
        while there.get(timeout=60):
            back.put(True)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()

    def round_trips() -> None:
        for _ in range(count):
            there.put(True)
            back.get(timeout=60)

    try:
        return typical(round_trips, 7) / (2 * count)
    finally:
        there.put(False)
        thread.join(timeout=60)


def pickling() -> Figures:
    import numpy

    array = numpy.random.default_rng(0).random(2**20, dtype=numpy.float32)
    numbers = [float(place) for place in range(50_000)]
    protocol = pickle.HIGHEST_PROTOCOL
    whole = typical(lambda: pickle.loads(pickle.dumps(array, protocol)), 5)
    items = typical(lambda: pickle.loads(pickle.dumps(numbers, protocol)), 5)
    return {
        "pickle_s_per_byte": (whole / array.nbytes, "dumps and loads of a 4 MiB numpy array, in band"),
        "pickle_item_s": (items / len(numbers), "dumps and loads of a list of floats, per float"),
    }
