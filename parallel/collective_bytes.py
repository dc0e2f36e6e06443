"""How many bytes each rank sends in a collective of ours: exact, by formula, also where p does not divide
n."""

from collections.abc import Callable, Sequence

from parallel.collective_call import HEADER_BYTES
from parallel.collective_costs import choose
from parallel.collective_rings import bounds
from parallel.collective_trees import children, subtree


def predict_communication(
    operation: str,
    count: int,
    itemsize: int,
    world_size: int,
    rank: int,
    *,
    root: int = 0,
    algorithm: str | None = None,
    splits: Sequence[int] | None = None,
    checked: bool = True,
) -> dict[str, int]:
    """{"send": bytes} that ``rank`` (of the group) sends in one call.

    count: elements of the whole vector, as collective_costs.py counts it (gathered output, unscattered
    input); itemsize: bytes of one; splits: of an all-to-all, elements for each rank, if not as many for
    each.
    """
    size, place = world_size, (rank - root) % world_size
    if operation == "all_to_all":
        own = splits[rank] if splits is not None else count // size
        elements = (sum(splits) if splits is not None else count) - own
        facts = 8 * (2 * size + 1)  # the splits, which are compared as well
    else:
        algorithm = algorithm or choose(operation, count * itemsize, size)
        elements, facts = _SENT[operation, algorithm](count, size, place), 0
    header = (HEADER_BYTES + facts) * (size - 1) if checked else 0
    total = header + elements * itemsize
    return {"send": total} if total else {}


def _chunk(count: int, size: int, place: int, places: int = 1) -> int:
    """Elements of the chunks ``place`` and following."""
    edges = bounds(count, size)
    return edges[place + places] - edges[place]


def _tree_broadcast(count: int, size: int, place: int) -> int:
    return count * len(children(place, size))


def _tree_reduce(count: int, size: int, place: int) -> int:
    return count if place else 0


def _tree_scatter(count: int, size: int, place: int) -> int:
    return sum(_chunk(count, size, child, subtree(child, size)) for child in children(place, size))


def _tree_gather(count: int, size: int, place: int) -> int:
    return _chunk(count, size, place, subtree(place, size)) if place else 0


def _reduce_scatter(count: int, size: int, place: int) -> int:
    """All chunks pass but the one that stays."""
    return count - _chunk(count, size, place)


def _all_gather(count: int, size: int, place: int) -> int:
    """All chunks pass but the one that the next rank had."""
    return count - _chunk(count, size, (place + 1) % size)


def _halving_doubling(count: int, size: int, rank: int) -> int:
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    if rank < 2 * extra and rank % 2 == 0:
        return count
    place = rank // 2 if rank < 2 * extra else rank - extra
    total, width = count if rank < 2 * extra else 0, 1
    while width < power:  # the window that is kept goes out when doubling, its sibling when halving
        window = place // width * width
        total += _chunk(count, power, window, width) + _chunk(count, power, window ^ width, width)
        width *= 2
    return total


_SENT: dict[tuple[str, str], Callable[[int, int, int], int]] = {
    ("broadcast", "tree"): _tree_broadcast,
    ("broadcast", "scatter_all_gather"): lambda *of: _tree_scatter(*of) + _all_gather(*of),
    ("reduce", "tree"): _tree_reduce,
    ("reduce", "reduce_scatter_gather"): lambda *of: _reduce_scatter(*of) + _tree_gather(*of),
    ("gather", "tree"): _tree_gather,
    ("scatter", "tree"): _tree_scatter,
    ("all_gather", "ring"): _all_gather,
    ("all_gather", "bruck"): _all_gather,
    ("reduce_scatter", "ring"): _reduce_scatter,
    ("all_reduce", "ring"): lambda *of: _reduce_scatter(*of) + _all_gather(*of),
    ("all_reduce", "halving_doubling"): _halving_doubling,
    ("all_reduce", "tree"): lambda *of: _tree_reduce(*of) + _tree_broadcast(*of),
}
