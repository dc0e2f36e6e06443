"""The two loops that walk through a schedule action by action, in numba: when each happens, and whether all
can happen at all. There may be millions; compiled once and kept (numba's cache)."""

import numba
import numpy as np


@numba.njit(cache=True)
def run(first, need, joined, rank_of, duration, transfer, overhead, handling):  # type: ignore[no-untyped-def]
    """(start, end, rows reached by each rank): each rank does its rows ``first[r]`` to ``first[r + 1]`` in
    order.

    A row begins when its rank is free and, if need >= 0, what it needs is there: at the end of that row on
    the same rank; from another, ``transfer`` seconds of that row after its sender's link has become free.
    ``overhead`` seconds pass before each row, ``handling`` more at either end of a message. A joined row and
    the next are one: both need to be ready, both end when both are through.
    """
    ranks = len(first) - 1
    position, free, link = first[:-1].copy(), np.zeros(ranks), np.zeros(ranks)
    start, end, arrival = np.zeros(len(need)), np.zeros(len(need)), np.full(len(need), -1.0)
    sends = np.zeros(len(need), np.bool_)
    for row in range(len(need)):
        if need[row] >= 0 and rank_of[need[row]] != rank_of[row]:
            sends[need[row]] = True
    waiting = np.full(len(need), -1, np.int32)
    stack = np.empty(2 * ranks, np.int32)
    stack[:ranks] = np.arange(ranks)
    top = ranks
    while top > 0:
        top -= 1
        rank = stack[top]
        while position[rank] < first[rank + 1]:
            row = position[rank]
            rows = 2 if joined[row] else 1
            begin, length, missing = free[rank], 0.0, -1
            for part in range(row, row + rows):
                length += duration[part]
                begin += overhead
                source = need[part]
                if source >= 0 and rank_of[source] != rank:
                    begin += handling
                    if arrival[source] < 0:
                        missing = source
                elif source >= row:
                    missing = source
            if missing >= 0:
                waiting[missing] = rank
                break
            for part in range(row, row + rows):
                if need[part] >= 0 and rank_of[need[part]] != rank:
                    begin = max(begin, arrival[need[part]] + handling)
            free[rank] = begin + length
            for part in range(row, row + rows):
                start[part] = begin
                end[part] = begin + length
                arrival[part] = end[part]
                if sends[part]:
                    free[rank] += handling
                    link[rank] = max(link[rank], free[rank]) + transfer[part]
                    arrival[part] = link[rank]
                if waiting[part] >= 0:
                    stack[top] = waiting[part]
                    top += 1
            position[rank] += rows
    return start, end, position


@numba.njit(cache=True)
def meet(first, need, partner, rank_of):  # type: ignore[no-untyped-def]
    """Rows reached by each rank if a send and its receive (each the other's ``partner``) are done only when
    both ranks have come to them, and every other row when what it needs, of the same rank, is done."""
    ranks = len(first) - 1
    position, queued = first[:-1].copy(), np.ones(ranks, np.bool_)
    stack = np.arange(ranks)
    top = ranks
    while top > 0:
        top -= 1
        rank = stack[top]
        queued[rank] = False
        while position[rank] < first[rank + 1]:
            row = position[rank]
            if partner[row] >= 0:
                peer = rank_of[partner[row]]
                if position[peer] != partner[row]:
                    break
                position[peer] += 1
                if not queued[peer]:
                    stack[top], queued[peer] = peer, True
                    top += 1
            elif need[row] >= row:
                break
            position[rank] += 1
    return position
