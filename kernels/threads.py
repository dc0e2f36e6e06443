"""numba functions over chunks of work, on the threads that torch already has.

numba's own parallel loops bring a second pool of threads. torch's workers spin for milliseconds after each
of torch's operations, so in a model that uses both, two pools fight for the same cores. Here the compiled
function is handed to the OpenMP runtime that torch itself loaded, through ``GOMP_parallel``, the entry point
that GCC's own parallel loops call (libgomp ABI, GCC's ``libgomp/parallel.c``). The team is torch's, it is
still awake, and ``torch.set_num_threads`` holds.

Which chunk computes what depends on the sizes alone, so that results do not depend on the number of threads.
Each thread has a range of neighbouring chunks, the same in each call, as in torch's own loops: its core finds
in its caches what it wrote last time, and no two threads touch fresh pages side by side. One that is through
helps the others, each range having a counter from which whoever comes takes the next chunk: a core that is
busy elsewhere takes fewer.

Where torch has no GNU OpenMP (macOS), Python threads take the chunks. After a fork, a child has the
parent's runtime without its threads and would wait for them for ever: it computes on one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.compiled_cache import address_of
from kernels.op import FallbackWarning
from kernels.simd import compiled_features, vector_bits

_WORD = ir.IntType(64)
_BYTE = ctypes.c_char
_HEAD = 4
"""Words of a block before the arguments: chunks, threads, the address of the function that tells a thread's
number, or 0, and then the counter that does."""
_LINE = 8  # words of a cache line, which no two counters of ranges share
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# How numba sees the elements of a tensor. 16-bit floats travel as integers: int16 holds IEEE half precision,
# uint16 holds bfloat16 (kernels/storage.py loads and stores them).
ELEMENTS: dict[torch.dtype, types.Type] = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.float16: types.int16,
    torch.bfloat16: types.uint16,
    torch.int8: types.int8,
    torch.uint8: types.uint8,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.bool: types.boolean,
}


@intrinsic
def _take(typing: Any, block: Any, word: Any) -> Any:
    """The counter in this word of the block, increased by one for whoever comes next."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), _WORD(1), "monotonic")

    return types.int64(block, word), codegen


@intrinsic
def _thread_number(typing: Any, address: Any) -> Any:
    """What the function of OpenMP at this address says: the place of the calling thread in its team."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        number = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.zext(number, _WORD)

    return types.int64(address), codegen


@intrinsic
def as_float(typing: Any, word: Any) -> Any:
    """The float64 with these 64 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(word), codegen


def pointer_to(element: types.Type) -> Any:
    """An intrinsic that makes an address a pointer to elements of this type."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        kind = types.CPointer(element)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(address), codegen

    return pointer


_NUMBERS = frozenset({int, float, bool})
_POINTERS = {element: pointer_to(element) for element in ELEMENTS.values()}


class Chunked:
    """``body(chunk, *arguments)``, compiled; calling it runs ``chunks`` of them on all threads.

    ``body`` is written as for ``numba.njit`` (error_model "numpy", the given ``fastmath`` flags). Called as
    ``body(chunks, *arguments)`` with CPU tensors that are contiguous, ints, floats, bools or None; inside, a
    tensor is a C-contiguous array (16-bit floats as integers, see ``kernels.storage``), a float is a float64.
    ``(tensor, rows, columns)`` is the tensor's memory in that shape, for less than a view costs.
    Chunks must write to places of their own. ``body.compiled`` is the njit function, for ``kernels.inspect``.
    """

    def __init__(self, body: Callable[..., None], fastmath: Any = ("contract",)) -> None:
        flags = fastmath if isinstance(fastmath, bool) else set(fastmath)
        self.compiled = numba.njit(error_model="numpy", fastmath=flags, nogil=True)(body)
        self.__name__ = body.__name__
        self.__doc__ = body.__doc__
        self._workers: dict[tuple[Any, ...], tuple[Any, int, Callable[..., bytes]]] = {}
        self._kept: list[Any] = []
        _BODIES.add(self)

    @property
    def signatures(self) -> list[tuple[types.Type, ...]]:
        """Types of the arguments it has been called with, as ``compiled`` takes them."""
        fold = self.compiled._compiler.fold_argument_types  # *arguments become one tuple
        return [tuple(fold(_signature(key), {})[1]) for key in self._workers]

    def __call__(self, chunks: int, *arguments: Any) -> None:
        threads = 1 if _forked else max(1, min(torch.get_num_threads(), chunks))
        key: list[Any] = []
        parallel = _gomp_parallel() if threads > 1 else None
        values: list[Any] = [chunks, threads, 0 if parallel is None else _address_of_thread_number(), 0]
        for value in arguments:
            kind = type(value)
            if kind is tuple:
                key.append((value[0].dtype, len(value) - 1))
                values.append(value[0].data_ptr())
                values += value[1:]
            elif kind in _NUMBERS:
                key.append(kind)
                values.append(value)
            elif value is None:
                key.append(None)
            elif isinstance(value, torch.Tensor):
                shape = value.shape
                key.append((value.dtype, len(shape)))
                values.append(value.data_ptr())
                values += shape
            else:
                raise TypeError(f"{self.__name__} takes tensors, numbers and None, no {kind.__name__}")
        found = self._workers.get(tuple(key))
        if found is None:
            found = self._workers[tuple(key)] = self._compile(tuple(key))
        worker, address, pack = found
        _run(worker, address, bytearray(pack(*values) + bytes(8 * _LINE * threads)), threads, parallel)

    def _compile(self, key: tuple[Any, ...]) -> tuple[Any, int, Callable[..., bytes]]:
        """A C function of one pointer that unpacks the arguments and works off chunks; and their layout."""
        _say_what_is_not_used()
        lines, names, layout = [], [], "@" + "q" * _HEAD
        space: dict[str, Any] = {
            "body": self.compiled,
            "carray": numba.carray,
            "take": _take,
            "thread_number": _thread_number,
            "as_float": as_float,
        }
        position = _HEAD
        for index, kind in enumerate(key):
            name = f"argument_{index}"
            names.append(name)
            if kind is None:
                names[-1] = "None"
            elif isinstance(kind, tuple):
                dtype, dimensions = kind
                if dtype not in ELEMENTS:
                    raise TypeError(f"{self.__name__} takes no tensor of {dtype}")
                space[f"pointer_{index}"] = _POINTERS[ELEMENTS[dtype]]
                sizes = "".join(f"block[{position + 1 + axis}], " for axis in range(dimensions)) or "1,"
                lines.append(f"{name} = carray(pointer_{index}(block[{position}]), ({sizes}))")
                position += 1 + dimensions
                layout += "q" * (1 + dimensions)
            else:
                word = f"block[{position}]"
                read = {float: f"as_float({word})", int: word, bool: f"{word} != 0"}[kind]
                lines.append(f"{name} = {read}")
                position += 1
                layout += "d" if kind is float else "q"
        text = "\n    ".join(
            [
                "def worker(data):",
                f"block = carray(data, {position})",
                "chunks, threads, told = block[0], block[1], block[2]",
                *lines,
                "own = thread_number(told) if told else take(data, 3)",
                "for others in range(threads):",
                "    place = (own + others) % threads",
                "    first, end = chunks * place // threads, chunks * (place + 1) // threads",
                "    while True:",
                f"        chunk = first + take(data, {position} + {_LINE} * place)",
                "        if chunk >= end:",
                "            break",
                f"        body({', '.join(['chunk', *names])})",
            ]
        )
        exec(text, space)
        signature = types.void(types.CPointer(types.int64))
        space["worker"].__name__ = self.__name__
        address, kept = address_of(signature, space["worker"], {"error_model": "numpy"})
        self._kept.append(kept)  # the machine code lives as long as this does
        return _C_FUNCTION(address), address, struct.Struct(layout).pack


def chunked(body: Callable[..., None] | None = None, *, fastmath: Any = ("contract",)) -> Any:
    """Decorator that makes a ``Chunked`` of a body: ``@chunked``, or ``@chunked(fastmath=...)``."""
    if body is None:
        return lambda body: Chunked(body, fastmath)
    return Chunked(body, fastmath)


_BODIES: weakref.WeakSet[Chunked] = weakref.WeakSet()


def calls_in(step: Callable[[], object]) -> dict[Chunked, list[tuple[types.Type, ...]]]:
    """Run ``step``: which bodies it called, each with which types of arguments (those of ``compiled``)."""
    before = {body: body._workers for body in _BODIES}
    try:
        for body in before:
            body._workers = {}
        step()
        return {body: body.signatures for body in _BODIES if body._workers}
    finally:
        for body, workers in before.items():
            body._workers = {**workers, **body._workers}


def _signature(key: tuple[Any, ...]) -> tuple[types.Type, ...]:
    numbers = {None: types.none, int: types.int64, float: types.float64, bool: types.boolean}
    return (
        types.int64,
        *(
            types.Array(ELEMENTS[kind[0]], max(1, kind[1]), "C") if isinstance(kind, tuple) else numbers[kind]
            for kind in key
        ),
    )


# --- running -------------------------------------------------------------------------------------

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Any:
    """The GNU OpenMP runtime that torch uses, or None."""
    if sys.platform != "linux":
        return None
    folder = Path(torch.__file__).parent
    bundled = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for name in [*map(str, bundled), None]:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(name)
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
            return library
    return None


def _gomp_parallel() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the runtime that torch uses, or None."""
    library = _openmp()
    return None if library is None else library.GOMP_parallel


@cache
def _address_of_thread_number() -> int:
    """Of ``omp_get_thread_num`` in that runtime."""
    return ctypes.cast(_openmp().omp_get_thread_num, ctypes.c_void_p).value or 0


@cache
def _say_what_is_not_used() -> None:
    """A ``FallbackWarning``, once, where the kernels run at a fraction of what this CPU can."""
    if vector_bits(compiled_features()) < vector_bits():
        warnings.warn(
            "kernels: NUMBA_CPU_NAME or NUMBA_CPU_FEATURES has numba compile for less than this CPU is; its "
            f"vectors of {vector_bits()} bits are not used",
            FallbackWarning,
            stacklevel=2,
        )
    if torch.get_num_threads() > 1 and _gomp_parallel() is None:
        warnings.warn(
            "kernels: torch has no GNU OpenMP runtime; Python threads do the work, started at each call",
            FallbackWarning,
            stacklevel=2,
        )


def _run(worker: Any, address: int, block: bytearray, threads: int, parallel: Any) -> None:
    data = _BYTE.from_buffer(block)
    if threads == 1:
        worker(ctypes.byref(data))
    elif parallel is not None:
        parallel(address, ctypes.byref(data), threads, 0)
    else:
        helpers = [threading.Thread(target=worker, args=(ctypes.byref(data),)) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        worker(ctypes.byref(data))
        for helper in helpers:
            helper.join()


def chunks_of(rows: int, least: int = 1, most: int = 256) -> int:
    """Into how many chunks to cut ``rows`` rows: at least ``least`` rows each, at most ``most`` chunks.

    Depends on the sizes alone, never on the number of threads.
    """
    return max(1, min(most, rows // max(1, least)))
