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


def _others(size: float, world_size: int) -> float:
    """Bytes of the vector that are not this rank's own part."""
    return size * (world_size - 1) / world_size
