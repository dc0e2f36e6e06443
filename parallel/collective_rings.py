"""Collectives that keep every link busy: no rank sends more bytes than it must. Any number of ranks.

A vector is cut into p chunks (``chunks``; they differ by one element at most where p does not divide it). In
each round every rank sends one chunk and receives another. Patarasuk and Yuan (2009); Thakur 4.1, 4.2, 4.5.
"""

import itertools

import torch

from parallel import collective_trees as trees
from parallel.point_to_point import Receive, Rounds, Send
from parallel.reductions import Combine


def bounds(count: int, parts: int) -> list[int]:
    """Where ``parts`` chunks of ``count`` elements begin, and the end."""
    return [part * count // parts for part in range(parts + 1)]


def chunks(flat: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Views of a flat tensor that cover it."""
    edges = bounds(flat.numel(), parts)
    return [flat[first:last] for first, last in itertools.pairwise(edges)]


def reduce_scatter(parts: list[torch.Tensor], combine: Combine, rank: int) -> Rounds:
    """parts[rank] becomes the combination over all ranks; the others are used up. (p-1) a + (p-1)/p n b.

    Chunk c starts at rank c + 1 and goes round once, every rank adding its own: the order of reduction is
    c + 1, c + 2, ..., c, fixed.
    """
    size = len(parts)
    arrived = torch.empty_like(max(parts, key=torch.numel)) if size > 1 else None
    for step in range(1, size):
        into = parts[(rank - step - 1) % size]
        buffer = arrived[: into.numel()]  # type: ignore[index]
        yield [Send((rank + 1) % size, parts[(rank - step) % size]), Receive((rank - 1) % size, buffer)]
        combine(into, buffer)


def all_gather(parts: list[torch.Tensor], rank: int) -> Rounds:
    """parts[i] of rank i to all. (p-1) a + (p-1)/p n b, between neighbours only."""
    size = len(parts)
    for step in range(size - 1):
        yield [
            Send((rank + 1) % size, parts[(rank - step) % size]),
            Receive((rank - 1) % size, parts[(rank - step - 1) % size]),
        ]


def all_reduce(flat: torch.Tensor, combine: Combine, rank: int, size: int) -> Rounds:
    """Reduce-scatter, then all-gather: 2(p-1) a + 2(p-1)/p n b. Every chunk is reduced on one rank and copied
    from there: the bits are the same on all ranks."""
    parts = chunks(flat, size)
    yield from reduce_scatter(parts, combine, rank)
    yield from all_gather(parts, rank)


def scatter_all_gather_broadcast(flat: torch.Tensor, place: int, size: int) -> Rounds:
    """Place 0's ``flat`` to all, long: a chunk to each down the tree, then round the ring.
    (ceil(log2 p) + p-1) a + 2(p-1)/p n b, where the tree alone needs ceil(log2 p) n b. Thakur 4.3 (van de
    Geijn)."""
    edges = bounds(flat.numel(), size)
    held = flat[edges[place] : edges[place + trees.subtree(place, size)]]
    yield from trees.scatter(held, edges, place, size)
    yield from all_gather(chunks(flat, size), place)


def reduce_scatter_gather_reduce(flat: torch.Tensor, combine: Combine, place: int, size: int) -> Rounds:
    """The combination of all in place 0's ``flat``, long: round the ring, then up the tree.
    (ceil(log2 p) + p-1) a + 2(p-1)/p n b. Thakur 4.4 (Rabenseifner)."""
    if place:
        flat = flat.clone()
    edges = bounds(flat.numel(), size)
    yield from reduce_scatter(chunks(flat, size), combine, place)
    held = flat[edges[place] : edges[place + trees.subtree(place, size)]]
    yield from trees.gather(held, edges, place, size)


def halving_doubling_all_reduce(flat: torch.Tensor, combine: Combine, rank: int, size: int) -> Rounds:
    """Recursive halving, then doubling: 2 log2(p) a + 2(p-1)/p n b where p is a power of two (Rabenseifner;
    Thakur 4.5). Otherwise the first 2r of p = 2^k + r ranks pair up: the even one gives its vector to the
    odd one and gets the result back, at 2 (a + n b) more. The bits are the same on all ranks, for the reason
    above."""
    most = 1 << (size.bit_length() - 1)  # ranks that take part
    extra = size - most
    paired = rank < 2 * extra
    if paired and rank % 2 == 0:
        yield [Send(rank + 1, flat)]
        yield [Receive(rank + 1, flat)]
        return
    arrived = torch.empty_like(flat if paired else flat[: (flat.numel() + 1) // 2])
    if paired:
        yield [Receive(rank - 1, arrived)]
        combine(flat, arrived)
    place = rank // 2 if paired else rank - extra

    def rank_at(place: int) -> int:
        return 2 * place + 1 if place < extra else place + extra

    edges = bounds(flat.numel(), most)
    first, last, distance, halves = 0, most, most // 2, []
    while distance:
        middle = first + distance
        upper = bool(place & distance)
        kept = (middle, last) if upper else (first, middle)
        given = (first, middle) if upper else (middle, last)
        mine = flat[edges[kept[0]] : edges[kept[1]]]
        theirs = flat[edges[given[0]] : edges[given[1]]]
        peer = rank_at(place ^ distance)
        buffer = arrived[: mine.numel()]
        yield [Send(peer, theirs), Receive(peer, buffer)]
        combine(mine, buffer)
        halves.append((peer, mine, theirs))
        (first, last), distance = kept, distance // 2
    for peer, mine, theirs in reversed(halves):
        yield [Send(peer, mine), Receive(peer, theirs)]
    if paired:
        yield [Send(rank - 1, flat)]


def all_to_all(received: list[torch.Tensor], sent: list[torch.Tensor], rank: int) -> Rounds:
    """sent[i] to received[rank] of rank i. In round s with rank + s and rank - s: (p-1) a + (p-1)/p n b."""
    size = len(sent)
    received[rank].copy_(sent[rank])
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        yield [Send(to, sent[to]), Receive(source, received[source])]
