"""What are the differences between a CPU and a GPU?

Answer. Both are limited by the same three things: how fast they compute, how fast they move bytes, and what
it costs to start. A GPU has some hundred times the arithmetic and ten to a hundred times the memory
bandwidth of a CPU, and pays for it with a launch in which a CPU adds tens of thousands of numbers from its
cache. So the size of the work decides, and so does where the data lies.

Formula (``model.py``):  time = call + max(FLOPs / peak, bytes / bandwidth at this working set) + page faults

Every constant comes from micro-kernels (``kernels/peaks.py``) or from an operation that is not predicted
here. Each operation is measured under two allocator modes, since a fresh 32 MiB output costs more than the
work itself.

Sources: S. Williams, A. Waterman, D. Patterson, Roofline: An Insightful Visual Performance Model for
Multicore Architectures, Communications of the ACM 52(4), 2009; mallopt(3); sheets in ``labs/machines``.
"""

from __future__ import annotations

from labs.lab import Lab
from labs.roofline.charts import figure, machine_chart
from labs.roofline.claims import CLAIMS
from labs.roofline.config import Config
from labs.roofline.operations import operations, variants
from labs.roofline.prediction import derive, predict
from labs.roofline.proof import check

__all__ = ["LAB", "Config", "machine_chart"]


def memory_bytes(config: Config) -> float:
    """The largest operation, and its float64 reference with temporaries at twice its size each."""
    return 5.0 * max(operation.bytes_moved for operation in operations(config)) + 512 * 2**20


LAB = Lab(
    name="roofline",
    question="What are the differences between a CPU and a GPU?",
    answer=(
        "Both are limited by arithmetic, by bytes moved or by the cost of starting. A GPU has some hundred "
        "times the arithmetic and ten to a hundred times the bandwidth of a CPU, but a call to it costs "
        "microseconds and the data must be there: the size of the work decides."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    derive=derive,
    columns=("default", "tuned"),
    seconds=6.0,
    sources=(
        "Williams, Waterman, Patterson: Roofline, Communications of the ACM 52(4), 2009",
        "glibc manual: mallopt(3), M_MMAP_THRESHOLD",
        "vendors' data sheets, cited figure by figure in labs/machines",
    ),
)
