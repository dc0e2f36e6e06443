"""How ranks pass bytes through shared memory: slots that are written, read and written again.

Every member of an exchange owns a few slots, each behind a cache line that says which round it holds and
what it is part of. An operation is a number of rounds; in one round a member

1. waits until everybody is done with what its slot held before, copies one chunk of its tensor into the
   slot (or one chunk for each member, where each gets something else) and publishes it by storing the
   round's number;
2. waits for the same round of those that it reads from, copies their chunks out, or reduces them in the
   order of ranks into its tensor, and says so by increasing its count of rounds taken.

The rounds are pipelined: while a peer reads one slot the next is written, and chunks are small enough to go
from cache to cache. All numbers only grow, so nothing is reset between operations. All collectives, send
and recv are this one function with other tables; all_reduce of two ranks is one pass, which moves the same
bytes as reduce-scatter and all-gather do (a ring: Patarasuk and Yuan 2009), with half the waits.

A member waits for one word at a time (``parallel.shm_words``): the first that its next step lacks, where it
lacks a slot of somebody else's to read that one, even if it could also write. Nobody waits in a circle: the
member that has taken the fewest rounds has everything that the others need of it, so whoever it reads from
can write.

``exchange`` never blocks for long: after a nap it returns STALLED and can be called again with the same
block. Who looks after signals, time-outs and dead peers is ``parallel.shm_progress``, in Python.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled_cache import address_of
from kernels.simd import full_width, store_fence
from kernels.threads import pointer_to
from parallel.shm_words import announce, give_way, load_acquire, pause, sleep_on

DONE, STALLED, DIFFERENT, RUNNING = range(4)
"""What ``exchange`` returns: finished; no progress; a header that differs; enough work for one call."""

LINE = 64
SLOT_SLEEPERS, TAKEN_SLEEPERS = 24, 8
"""Bytes from a slot's first word, and from a count of rounds taken, to the number of who sleeps on it."""
STREAMED_BYTES = 1 << 14  # chunks from this size on are written past the caches, where that was found faster
POSTS, COMPARES = 1, 2  # role: writes a header in round 0; waits for everybody's and compares them

# Words of the block, which describes one operation and how far it has come.
MEMBERS, ME, SLOTS, STRIDE, SLOT_BASE, TAKEN_BASE, SCRATCH, MOST, SPINS, YIELDS = range(10)
NAP_SECONDS, NAP_NANOSECONDS = range(10, 12)  # a struct timespec
STREAMS = 12  # 1: past the caches
BEFORE, ROUNDS, CHUNK, PARTS, ROLE, SIGNATURE, COUNT, REDUCE, FACTOR, WRITTEN, CONSUMED = range(13, 24)
TABLES = 24  # input addresses, input bytes, output addresses, output bytes, sources: one each a member

_LONG, _VOID = ir.IntType(64), ir.VoidType()
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def copy_bytes(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """memcpy of the C library, which knows the CPU."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES, _LONG])
        function = cgutils.get_or_insert_function(builder.module, kind, "memcpy")
        builder.call(
            function, [builder.inttoptr(args[0], _BYTES), builder.inttoptr(args[1], _BYTES), args[2]]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def call_reduction(
    typing: Any, function: Any, out: Any, sources: Any, members: Any, count: Any, scratch: Any, factor: Any
) -> Any:
    """Call the C function at an address, made by ``parallel.shm_reduce``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_VOID, [_LONG] * 6).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def word_address(typing: Any, block: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(builder.ptrtoint(args[0], _LONG), builder.shl(args[1], _LONG(3)))

    return types.int64(block, types.int64), codegen


_longs = pointer_to(types.int64)


@intrinsic
def _stream_line(typing: Any, target: Any, source: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), 16).as_pointer()
        value = builder.load(builder.inttoptr(args[1], vector))
        value.align = 1
        store = builder.store(value, builder.inttoptr(args[0], vector))
        store.align = LINE
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@numba.njit(forceinline=True)
def copy_streamed(target: Any, source: Any, count: Any) -> None:
    """A copy past the caches, for CPUs where a line comes faster from memory than from another core."""
    full_width()
    whole = count // LINE * LINE
    for offset in range(0, whole, LINE):
        _stream_line(target + offset, source + offset)
    store_fence()
    copy_bytes(target + whole, source + whole, count - whole)


def exchange(block: Any) -> Any:
    """Rounds of the operation that the block describes, until it is done, stalled or has used its share."""
    members, me, slots, stride = block[MEMBERS], block[ME], block[SLOTS], block[STRIDE]
    slot_base, taken_base, before = block[SLOT_BASE], block[TAKEN_BASE], block[BEFORE]
    rounds, chunk, parts, role = block[ROUNDS], block[CHUNK], block[PARTS], block[ROLE]
    written, consumed, streams = block[WRITTEN], block[CONSUMED], block[STREAMS] != 0
    input_bytes, outputs = TABLES + members, TABLES + 2 * members
    output_bytes, sources = TABLES + 3 * members, TABLES + 4 * members
    waited, handled = 0, 0
    while True:
        moved, missing, seen, sleepers = False, 0, 0, 0
        # Headers are compared before a second round is written, so that all ranks stop in the same one.
        if written < rounds and (written == 0 or consumed > 0):
            offset = written * chunk
            posts = written == 0 and role & POSTS != 0
            for part in range(parts):
                posts |= block[input_bytes + part] > offset
            free = True
            if posts:
                for q in range(members):
                    held = load_acquire(taken_base + q * LINE)
                    if q != me and held <= before + written - slots:
                        free, missing, seen = False, taken_base + q * LINE, held
                        sleepers = missing + TAKEN_SLEEPERS
                        break
            if free:
                if posts:
                    slot = slot_base + (me * slots + (before + written) % slots) * stride
                    for part in range(parts):
                        size = min(block[input_bytes + part] - offset, chunk)
                        if size > 0 and (parts == 1 or part != me):
                            if streams and size >= STREAMED_BYTES:
                                copy_streamed(slot + LINE + part * chunk, block[TABLES + part] + offset, size)
                            else:
                                copy_bytes(slot + LINE + part * chunk, block[TABLES + part] + offset, size)
                    header = _header(_longs(slot))
                    header[1], header[2] = block[SIGNATURE], block[COUNT]
                    announce(slot, before + written + 1, slot + SLOT_SLEEPERS)
                written += 1
                moved = True
        if consumed < written:
            offset = consumed * chunk
            compares = consumed == 0 and role & COMPARES != 0
            place = (before + consumed) % slots
            here = True
            for q in range(members):
                if q != me and (compares or block[output_bytes + q] > offset):
                    slot = slot_base + (q * slots + place) * stride
                    held = load_acquire(slot)
                    if held <= before + consumed:
                        here, missing, seen = False, slot, held
                        sleepers = missing + SLOT_SLEEPERS
                        break
            if here:
                if compares:
                    for q in range(members):
                        header = _header(_longs(slot_base + (q * slots + place) * stride))
                        if header[1] != block[SIGNATURE] or header[2] != block[COUNT]:
                            block[WRITTEN], block[CONSUMED] = written, consumed
                            return DIFFERENT
                part = me * chunk if parts > 1 else 0
                if block[REDUCE] != 0:
                    size = min(block[output_bytes] - offset, chunk)
                    if size > 0:
                        for q in range(members):
                            block[sources + q] = slot_base + (q * slots + place) * stride + LINE + part
                        block[sources + me] = block[TABLES + (me if parts > 1 else 0)] + offset
                        call_reduction(
                            block[REDUCE],
                            block[outputs] + offset,
                            word_address(block, sources),
                            members,
                            size,
                            block[SCRATCH],
                            block[FACTOR],
                        )
                else:
                    for q in range(members):
                        size = min(block[output_bytes + q] - offset, chunk)
                        source = slot_base + (q * slots + place) * stride + LINE + part
                        if q == me:
                            source = block[TABLES + (me if parts > 1 else 0)] + offset
                        target = block[outputs + q] + offset
                        if size > 0 and target != source:
                            copy_bytes(target, source, size)
                taken = taken_base + me * LINE
                announce(taken, before + consumed + 1, taken + TAKEN_SLEEPERS)
                consumed += 1
                moved = True
                handled += 1
        if consumed == rounds:
            block[WRITTEN], block[CONSUMED] = written, consumed
            return DONE
        if moved:
            waited = 0
            if handled < block[MOST]:
                continue
        elif waited < block[SPINS] * block[YIELDS]:
            waited += 1
            pause()
            if waited % block[SPINS] == 0:
                give_way()
            continue
        elif block[NAP_NANOSECONDS] != 0 and sleep_on(
            missing, seen, sleepers, word_address(block, NAP_SECONDS)
        ):
            waited = 0
            continue
        block[WRITTEN], block[CONSUMED] = written, consumed
        return RUNNING if handled else STALLED


@numba.njit(forceinline=True)
def _header(slot: Any) -> Any:
    return numba.carray(slot, (3,))


@cache
def compiled() -> tuple[Any, Any]:
    """(``exchange``, called with the address of a block and without the GIL; what keeps it alive)."""
    kind = types.int64(types.CPointer(types.int64))
    address, kept = address_of(kind, exchange, {"error_model": "numpy"})
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address), kept
