"""The parts put together."""

from __future__ import annotations

from collections.abc import Sequence

from labs.concurrency import compute, hazards, moving, overhead, sweeps, timeline
from labs.concurrency.claims import CLAIMS
from labs.concurrency.config import Config
from labs.concurrency.figures import figure
from labs.concurrency.model import predict
from labs.concurrency.proof import check
from labs.lab import Lab, Variant


def variants(config: Config) -> Sequence[Variant]:
    """All groups in the order they are run; hazards last, since they disturb what runs beside them."""
    parts = (compute, overhead, moving, sweeps, timeline, hazards)
    return [variant for part in parts for variant in part.variants(config)]


def memory_bytes(config: Config) -> float:
    """Payloads in flight: the array, its copies on both sides of a pipe, the result; NumPy's arrays."""
    return 8.0 * 4 * config.payload_elements + 16.0 * config.elements * config.pool + 2**30


LAB = Lab(
    name="concurrency",
    question="What is multithreading vs multiprocessing?",
    answer=(
        "Threads share memory and one lock (the GIL): they make waiting faster, and compiled work that "
        "releases the lock. Processes share nothing: they make pure Python faster too, once a task is long "
        "enough to pay for being sent and carries few enough bytes."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    derive=sweeps.derive,
    seconds=10.0,
    sources=(
        "CPython documentation: concurrent.futures, multiprocessing, sys.setswitchinterval",
        "PEP 703: making the global interpreter lock optional",
        "G. M. Amdahl, Validity of the single processor approach, AFIPS 1967",
        "P. Moritz et al., Ray: a distributed framework for emerging AI applications, OSDI 2018",
    ),
)
