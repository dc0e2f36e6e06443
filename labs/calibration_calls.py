"""What one step of software costs: an interpreted operation, a library call, a hand-over between threads.

Used by ``labs.calibration``. Each loop's own cost is measured empty and taken off. What an operation costs
comes from those that no lab predicts by it (``negative`` of NumPy and JAX, eight of torch, four where a
gradient is recorded): a constant never comes from the operation it predicts.
"""

from __future__ import annotations

import math
import pickle
import queue
import threading
from collections.abc import Callable
from typing import Any

from labs.calibration_hardware import RUNS, Figures, typical

COUNT, CALLS = 20_000, 8  # of a loop, of ``several_calls``


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


def _loop_functions(values: list[float]) -> None:
    x, function = 1.5, math.fabs
    for _ in range(COUNT):
        function(x)
        function(x)
        function(x)
        function(x)


def _nothing() -> None:
    pass


def _loop_calls(values: list[float]) -> None:
    for _ in range(COUNT):
        _nothing()


def python_operation(runs: int = RUNS) -> float:
    """Seconds of one float multiplication or addition in a plain loop."""
    return (typical(lambda: _loop_arithmetic([]), runs) - typical(lambda: _loop_empty([]), runs)) / (
        8 * COUNT
    )


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
        "python_step_s": (empty / COUNT, "a turn of an empty for loop over a range"),
        "python_function_s": (
            (typical(lambda: _loop_functions(values)) - empty) / (4 * COUNT),
            "math.fabs of a float, loop taken off",
        ),
    }


def _per_call(step: Callable[[], object], count: int = 2_000, runs: int = RUNS) -> float:
    """Seconds of one call from a Python loop; the loop itself (some 20 ns) stays in."""

    def many() -> None:
        for _ in range(count):
            step()

    return typical(many, runs) / count


# --- libraries -------------------------------------------------------------------------------------


def numpy_call(runs: int = RUNS) -> float:
    import numpy

    one = numpy.ones(1, numpy.float32)
    return _per_call(lambda: numpy.negative(one, out=one), runs=runs)


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
    called = numpy_call()
    numba_call = _per_call(lambda: kernel.call(one))
    region = typical(lambda: kernel.region(cores), 1000)
    exponential = _per_call(lambda: numpy.exp(block, out=out), 100)
    kernel.libm_exp(block, 1)
    # Rows that are no multiple of one another in memory: numpy starts its inner loop anew for each.
    rows = numpy.ones((4096, 16), numpy.float32)[:, :8]
    out_rows = numpy.empty((4096, 16), numpy.float32)[:, :8]
    by_row = _per_call(lambda: numpy.negative(rows, out=out_rows), 10)
    wide, narrow = numpy.ones(16384, numpy.int64), numpy.ones(16384, numpy.int16)
    converted = _per_call(lambda: numpy.subtract(wide, narrow, out=wide), 10)
    table, row = numpy.ones((256, 256), numpy.float32), numpy.ones(256, numpy.float32)
    out_table, column = numpy.empty_like(table), numpy.ones((256, 1), numpy.float32)
    spread = _per_call(lambda: numpy.subtract(column, row, out=out_table), 10)
    whole = _per_call(lambda: numpy.subtract(table, table, out=out_table), 10)
    libm = typical(lambda: kernel.libm_exp(block, 10)) / (10 * block.size)
    return {
        "numpy_call_s": (called, "numpy.negative of one element with out="),
        "numpy_reduction_call_s": (
            _per_call(lambda: matrix.min(0)),
            "minimum of a 1 x 1 matrix over its first axis",
        ),
        "numpy_exp_s": (
            (exponential - called) / block.size,
            "numpy.exp, 4096 float32 in cache, per element",
        ),
        "numpy_inner_loop_s": (
            (by_row - called) / len(rows),
            "numpy.negative of 4096 strided rows of 8 elements with out=, per row",
        ),
        "numpy_broadcast_row_s": (
            max(spread - whole, 0.0) / len(table),
            "numpy.subtract of a row of 256 from a column of 256, less that of whole arrays, per row",
        ),
        "numpy_conversion_s": (
            (converted - called) / wide.size,
            "numpy.subtract of 16384 int16 from int64 in place, which converts piece by piece, per element",
        ),
        "numba_call_s": (numba_call, "njit function of one array that returns its first item"),
        "numba_parallel_region_s": (
            max(region - numba_call, 0.0),
            "njit(parallel=True) with one trivial iteration a core, call taken off",
        ),
        "libm_exp_s": (libm, "expf of 4096 float32 in cache from a compiled loop, per element"),
    }


def several_calls() -> Callable[[], None]:
    """A function that calls eight different torch operations on one element."""
    import torch

    one, other = torch.ones(1), torch.full((1,), 2.0)

    def several() -> None:
        torch.neg(one)
        torch.fmod(one, other)
        torch.floor(one)
        torch.copysign(one, other)
        torch.sign(one)
        torch.fmax(one, other)
        torch.logical_not(one)
        torch.trunc(one)

    return several


def torch_call(runs: int = RUNS) -> float:
    """Seconds of an operation among others, as in a program: code that one follows another to is less at hand
    than that of one operation again and again."""
    return _per_call(several_calls(), 250, runs) / CALLS


def torch_calls() -> Figures:
    """Eager dispatch, and what splitting an operation over the intra-op threads adds."""
    import torch

    threads = torch.get_num_threads()
    grain = 32768  # at::internal::GRAIN_SIZE: smaller pieces are not split
    one = torch.ones(1)
    figures: Figures = {
        "torch_call_s": (torch_call(), "eight different operations on one element in a row, per operation"),
        "torch_scalar_call_s": (
            _per_call(lambda: one - 0.5),
            "a Python number subtracted from a torch tensor of one element",
        ),
        "torch_module_call_s": (_module_call(), "calling torch.nn.Identity"),
        "torch_product_call_s": (_product_call(), "torch.bmm of one 8 x 8 matrix, output allocated"),
    }
    recorded, alone = _recorded_call(), _recorded_call(1)
    figures["torch_recorded_call_s"] = (
        recorded,
        "four different operations on one element that requires a gradient, forward and backward, per "
        "operation of 32 in a row",
    )
    figures["torch_backward_s"] = (
        max(alone - recorded, 0.0),
        "forward and backward of one such operation, less that: starting autograd's engine",
    )
    if threads > 1:
        large = torch.rand(grain * threads)
        out = torch.empty_like(large)
        call = _per_call(lambda: torch.neg(one, out=one))
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

    one = torch.full((1,), 0.5, requires_grad=True)
    several = (torch.neg, torch.sin, torch.sinh, torch.expm1)  # of one or two operations in backward

    def there_and_back() -> None:
        value = one
        for place in range(count):
            value = several[place % len(several)](value)
        torch.autograd.grad(value, one)

    return _per_call(there_and_back, 50) / count


def jax_call(runs: int = RUNS) -> float:
    import jax

    step = jax.jit(lambda x: -x)
    one: Any = jax.device_put(1.0, jax.devices("cpu")[0])
    return _per_call(lambda: step(one).block_until_ready(), 500, runs)


def jax_calls() -> Figures:
    import jax
    import jax.numpy as jnp

    several = jnp.ones(2048, device=jax.devices("cpu")[0])
    return {
        "jax_call_s": (
            jax_call(),
            "jitted negation of a scalar, dispatch and block_until_ready",
        ),
        "jax_eager_call_s": (
            _dispatched_call(jnp.negative, jax.device_put(1.0, jax.devices("cpu")[0])),
            "jax.numpy.negative of a scalar, 32 in a row and one block_until_ready, per operation",
        ),
        "jax_scalar_call_s": (
            _dispatched_call(lambda value: value - 0.5, jax.device_put(1.0, jax.devices("cpu")[0])),
            "a Python number subtracted from a JAX scalar by the operator, 32 in a row, per operation",
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
