"""Collectives along a binomial tree: ceil(log2 p) rounds, best where latency counts. Any number of ranks.

The root is place 0 (``shifted`` maps places to ranks). The parent of a place is the place without its lowest
set bit, and below place v with lowest set bit 2^k stand the places v to v + 2^k - 1: the data of a subtree
lie side by side. Thakur 4.3 and 4.4; Chan, section 4.1 ("minimum spanning tree").
"""

import torch

from parallel.point_to_point import Message, Receive, Rounds, Send
from parallel.reductions import Combine


def parent(place: int) -> int:
    """The place above; place 0 has none."""
    return place - (place & -place)


def children(place: int, size: int) -> list[int]:
    """The places right below, those with the largest subtrees first."""
    levels = (place & -place).bit_length() - 1 if place else (size - 1).bit_length()
    return [place + (1 << level) for level in reversed(range(levels)) if place + (1 << level) < size]


def subtree(place: int, size: int) -> int:
    """How many places stand at and below ``place``."""
    return min(place & -place, size - place) if place else size


def broadcast(flat: torch.Tensor, place: int, size: int) -> Rounds:
    """``flat`` of place 0 to all: ceil(log2 p) (a + n b)."""
    if place:
        yield [Receive(parent(place), flat)]
    yield [Send(child, flat) for child in children(place, size)]


def reduce(flat: torch.Tensor, combine: Combine, place: int, size: int) -> Rounds:
    """The combination of all in place 0's ``flat``; that of the others stays: ceil(log2 p) (a + n b).

    Order: each place combines its own with what its children found, the smallest subtree first.
    """
    below = children(place, size)
    if below and place:
        flat = flat.clone()
    arrived = torch.empty_like(flat) if below else flat
    for child in reversed(below):
        yield [Receive(child, arrived)]
        combine(flat, arrived)
    if place:
        yield [Send(parent(place), flat)]


def all_reduce(flat: torch.Tensor, combine: Combine, place: int, size: int) -> Rounds:
    """Reduce, then broadcast: 2 ceil(log2 p) (a + n b). All get place 0's bits."""
    yield from reduce(flat, combine, place, size)
    yield from broadcast(flat, place, size)


def scatter(held: torch.Tensor, edges: list[int], place: int, size: int) -> Rounds:
    """Place 0 holds all chunks; each place gets those of its subtree, its own first, in ``held``.

    edges: where the chunks of all places begin in the whole, and its end. ceil(log2 p) a + (p-1)/p n b.
    """
    if place:
        yield [Receive(parent(place), held)]
    yield [Send(child, _window(held, edges, place, child, size)) for child in children(place, size)]


def gather(held: torch.Tensor, edges: list[int], place: int, size: int) -> Rounds:
    """The scatter backwards: each place has its own chunk first in ``held``; place 0 gets all.

    The smallest subtrees come first: they are ready first.
    """
    below = reversed(children(place, size))
    yield [Receive(child, _window(held, edges, place, child, size)) for child in below]
    if place:
        yield [Send(parent(place), held)]


def _window(held: torch.Tensor, edges: list[int], place: int, child: int, size: int) -> torch.Tensor:
    first, last = edges[child], edges[child + subtree(child, size)]
    return held[first - edges[place] : last - edges[place]]


def shifted(rounds: Rounds, root: int, size: int) -> Rounds:
    """The same with rank ``root`` in place 0, the next in place 1, and so on."""

    def moved(message: Message) -> Message:
        return message._replace(peer=(message.peer + root) % size)

    for messages in rounds:
        yield [moved(message) for message in messages]
