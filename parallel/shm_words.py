"""Words of shared memory on which ranks wait for each other, as numba intrinsics.

A word is a 64-bit number that one rank writes and that only grows. Loads acquire, stores release. Who waits
for one looks again after a short spin, gives its core away between the spins (``sched_yield``), and then
sleeps in the kernel until it is woken (``futex``, on the word's lower half). Long spins take the core from
the rank that is waited for, wherever ranks share one: more ranks than cores, other programs beside them, or a
scheduler that has put two ranks on the same core while another is free. ``sched_yield`` alone gives a whole
time slice away to any other program; a sleeper keeps its claim.

A rank that stores wakes the sleepers, if there are any: each word has a count of them beside it. To count
and to look at the word again happens in this order here, to store and to look at the count there, with a full
fence between, so one of the two sees the other. A sleeper that was killed leaves the count too high, which
costs a call to the kernel now and then.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
"""The number of the system call; 0: not known for this machine, and nobody sleeps in ``sleep_on``."""
_WAIT, _WAKE, _ALL = 0, 1, (1 << 31) - 1  # linux/futex.h; not the private ones, which are of one process

_LONG, _VOID = ir.IntType(64), ir.VoidType()


@intrinsic
def load_acquire(typing: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typing: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _LONG.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typing: Any, address: Any, value: Any) -> Any:
    """Add to a word that several ranks write; a full fence."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.inttoptr(args[0], _LONG.as_pointer()), args[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _full_fence(typing: Any) -> Any:
    """What is loaded behind it is not older than what was stored before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _system_call(typing: Any, number: Any, address: Any, operation: Any, value: Any, limit: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_LONG, [_LONG], var_arg=True)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "syscall"), args)

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def give_way(typing: Any) -> Any:
    """``sched_yield``: the peer may be waiting for this very core."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typing: Any) -> Any:
    """Tell an x86 core that this is a spin; nothing elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if str(builder.module.triple).startswith("x86_64"):
            kind = ir.FunctionType(_VOID, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@numba.njit(forceinline=True)
def announce(word: Any, value: Any, sleepers: Any) -> None:
    """Store ``value`` in the word, and wake those who sleep on it; ``sleepers``: address of their count."""
    store_release(word, value)
    _full_fence()
    if load_acquire(sleepers) != 0:
        _system_call(FUTEX, word, _WAKE, _ALL, 0)


@numba.njit(forceinline=True)
def sleep_on(word: Any, seen: Any, sleepers: Any, limit: Any) -> bool:
    """Sleep while the word is ``seen``. False: it still is, after ``limit`` (address of a struct timespec) or
    a signal."""
    _add(sleepers, 1)
    _system_call(FUTEX, word, _WAIT, seen & 0xFFFFFFFF, limit)
    _add(sleepers, -1)
    return load_acquire(word) != seen
