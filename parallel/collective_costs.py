"""What a collective costs: the alpha-beta model, one function an algorithm.

A message of n bytes takes ``latency + n * seconds_per_byte``; a rank sends one message and receives one at
the same time. The arithmetic of a reduction is left out: it is memory traffic of the processor, not of the
link.

In every function ``size`` is the whole vector in bytes: the tensor of an all-reduce, broadcast or reduce, the
gathered output of an all-gather or gather, the unscattered input of a reduce-scatter or scatter, and what a
rank holds before an all-to-all. The result is seconds from the moment all ranks have called.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 3 to 4.5; Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication: theory, practice, and
experience" (2007), tables I to III; Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations" (2009), theorem 1: no all-reduce moves less than 2(p-1)/p n bytes through the busiest rank, so
the ring is optimal in bytes, and only its 2(p-1) messages can be beaten.
"""

from collections.abc import Callable


def rounds(world_size: int) -> int:
    """ceil(log2(world_size)): messages in a row that it takes for one rank's data to reach all."""
    return (world_size - 1).bit_length()


def message_cost(size: float, latency: float, seconds_per_byte: float) -> float:
    """One message."""
    return latency + size * seconds_per_byte


def tree_broadcast_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Binomial tree: ceil(log2 p) (a + n b). Best for short messages. Thakur 4.3."""
    return rounds(world_size) * message_cost(size, latency, seconds_per_byte)


def tree_reduce_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Binomial tree, the broadcast backwards: ceil(log2 p) (a + n b). Thakur 4.4."""
    return tree_broadcast_cost(size, world_size, latency, seconds_per_byte)


def tree_gather_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Binomial tree: ceil(log2 p) a + (p-1)/p n b; the root must receive (p-1)/p n in any case. Chan, table
    I."""
    return rounds(world_size) * latency + _others(size, world_size) * seconds_per_byte


def tree_scatter_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Binomial tree, the gather backwards: ceil(log2 p) a + (p-1)/p n b. Chan, table I."""
    return tree_gather_cost(size, world_size, latency, seconds_per_byte)


def direct_gather_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Every rank sends straight to the root, and nothing twice: (p-1) a + (p-1)/p n b."""
    return (world_size - 1) * latency + _others(size, world_size) * seconds_per_byte


def ring_all_gather_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """(p-1) a + (p-1)/p n b. Thakur 4.1."""
    return direct_gather_cost(size, world_size, latency, seconds_per_byte)


def ring_reduce_scatter_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """The all-gather backwards: (p-1) a + (p-1)/p n b. Chan, table II."""
    return direct_gather_cost(size, world_size, latency, seconds_per_byte)


def pairwise_all_to_all_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """p-1 exchanges, each with another rank: (p-1) a + (p-1)/p n b. Thakur 4.2."""
    return direct_gather_cost(size, world_size, latency, seconds_per_byte)


def ring_all_reduce_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Reduce-scatter, then all-gather: 2(p-1) a + 2(p-1)/p n b. Patarasuk and Yuan, section 3."""
    return 2 * direct_gather_cost(size, world_size, latency, seconds_per_byte)


def halving_doubling_all_reduce_cost(
    size: float, world_size: int, latency: float, seconds_per_byte: float
) -> float:
    """2 log2(p) a + 2(p-1)/p n b for a power of two; else of the power of two below p, and 2 (a + n b) for
    the ranks above it to give theirs away and get the result. Thakur 4.5."""
    power = 1 << (world_size.bit_length() - 1)
    pairs = 2 * message_cost(size, latency, seconds_per_byte) if power < world_size else 0.0
    return 2 * tree_gather_cost(size, power, latency, seconds_per_byte) + pairs


def tree_all_reduce_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """Reduce to one, then broadcast: 2 ceil(log2 p) (a + n b)."""
    return 2 * tree_broadcast_cost(size, world_size, latency, seconds_per_byte)


def bruck_all_gather_cost(size: float, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """ceil(log2 p) a + (p-1)/p n b for any p. Thakur 4.1. In this model never worse than the ring, which
    however only talks to neighbours and needs no second buffer."""
    return tree_gather_cost(size, world_size, latency, seconds_per_byte)


def scatter_all_gather_broadcast_cost(
    size: float, world_size: int, latency: float, seconds_per_byte: float
) -> float:
    """Scatter down the tree, all-gather round the ring: (ceil(log2 p) + p-1) a + 2(p-1)/p n b. Thakur 4.3."""
    scatter = tree_scatter_cost(size, world_size, latency, seconds_per_byte)
    return scatter + ring_all_gather_cost(size, world_size, latency, seconds_per_byte)


def reduce_scatter_gather_reduce_cost(
    size: float, world_size: int, latency: float, seconds_per_byte: float
) -> float:
    """Reduce-scatter round the ring, gather up the tree: (ceil(log2 p) + p-1) a + 2(p-1)/p n b. Thakur
    4.4."""
    return scatter_all_gather_broadcast_cost(size, world_size, latency, seconds_per_byte)


def _others(size: float, world_size: int) -> float:
    """Bytes of the vector that are not this rank's own part."""
    return size * (world_size - 1) / world_size


Cost = Callable[[float, int, float, float], float]
ALGORITHMS: dict[str, dict[str, Cost]] = {
    "broadcast": {"tree": tree_broadcast_cost, "scatter_all_gather": scatter_all_gather_broadcast_cost},
    "reduce": {"tree": tree_reduce_cost, "reduce_scatter_gather": reduce_scatter_gather_reduce_cost},
    "gather": {"tree": tree_gather_cost},
    "scatter": {"tree": tree_scatter_cost},
    "all_gather": {"ring": ring_all_gather_cost, "bruck": bruck_all_gather_cost},
    "reduce_scatter": {"ring": ring_reduce_scatter_cost},
    "all_reduce": {
        "ring": ring_all_reduce_cost,
        "halving_doubling": halving_doubling_all_reduce_cost,
        "tree": tree_all_reduce_cost,
    },
    "all_to_all": {"pairwise": pairwise_all_to_all_cost},
}

# Gloo between two processes of one host (measured: 90 us, 1.3 to 2.3 GB/s): where the crossovers lie by
# default.
LATENCY, SECONDS_PER_BYTE = 9e-5, 1 / 1.5e9


def algorithms(operation: str) -> list[str]:
    """The algorithms of a collective. ValueError: no such collective."""
    if operation not in ALGORITHMS:
        raise ValueError(f"no collective {operation!r}; there are {', '.join(ALGORITHMS)}")
    return list(ALGORITHMS[operation])


def cost(
    operation: str,
    size: float,
    world_size: int,
    latency: float = LATENCY,
    seconds_per_byte: float = SECONDS_PER_BYTE,
    algorithm: str | None = None,
) -> float:
    """Seconds of a collective by ``algorithm``, or by the cheapest."""
    names = algorithms(operation) if algorithm is None else [algorithm]
    if unknown := set(names) - set(algorithms(operation)):
        raise ValueError(f"{operation} has no algorithm {unknown.pop()!r}; it has {algorithms(operation)}")
    return min(ALGORITHMS[operation][name](size, world_size, latency, seconds_per_byte) for name in names)


def choose(
    operation: str,
    size: float,
    world_size: int,
    latency: float = LATENCY,
    seconds_per_byte: float = SECONDS_PER_BYTE,
) -> str:
    """The cheapest algorithm; of equals the first named in ``ALGORITHMS``."""
    return min(
        algorithms(operation),
        key=lambda name: cost(operation, size, world_size, latency, seconds_per_byte, name),
    )
