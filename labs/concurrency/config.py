"""The lab's settings and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting
from labs.machine import usable_cores

MOST_WORKERS = 8  # what the automatic choice stops at: more teach nothing new and start slowly

# Iterations a task in the sweep over task lengths, and bytes a task in the sweep over payloads.
TASK_SWEEP = (300, 1_000, 3_000, 10_000, 30_000)
PAYLOAD_SWEEP = (2**16, 2**18, 2**20, 2**22)
PAYLOAD_ITERATIONS = 200_000  # Python work of a task of that sweep: some milliseconds


@dataclass(frozen=True)
class Config:
    workers: int = setting(
        0, unit="workers", help="threads or processes; 0: one a core, at most 8", minimum=0, maximum=64
    )
    tasks: int = setting(
        8, unit="tasks", help="tasks of one step of the compute groups", minimum=1, maximum=1024
    )
    iterations: int = setting(
        400_000,
        quick=200_000,
        full=2_000_000,
        unit="iterations",
        help="loop iterations of one pure Python task (NumPy and numba tasks take about as long)",
        minimum=1_000,
        maximum=10**9,
    )
    elements: int = setting(
        131_072, unit="elements", help="float64 in a NumPy task's array", minimum=1, maximum=10**8
    )
    waits: int = setting(16, unit="waits", help="blocking waits of the waiting group", minimum=1, maximum=256)
    many_waits: int = setting(
        1_000, quick=500, unit="waits", help="waits of many_waits", minimum=1, maximum=10**5
    )
    wait_s: float = setting(0.01, unit="s", help="length of one wait", minimum=0.001, maximum=10.0)
    tiny_tasks: int = setting(1_000, quick=400, unit="tasks", help="empty tasks", minimum=1, maximum=10**6)
    payload_MiB: int = setting(
        8, quick=4, full=32, unit="MiB", help="array sent there and back", minimum=1, maximum=512
    )
    ranks: int = setting(
        2, unit="processes", help="ranks of the torch.distributed world of combine", minimum=2, maximum=64
    )
    hazard_s: float = setting(
        5.0, quick=3.0, full=12.0, unit="s", help="time limit of a hazard", minimum=0.5, maximum=60.0
    )

    @property
    def pool(self) -> int:
        """Workers of every pool."""
        return self.workers or min(usable_cores(), MOST_WORKERS)

    @property
    def numpy_iterations(self) -> int:
        """So many that a task takes about as long whatever the array's length is, which is that of its calls:
        where they are shorter than the hand-over of the GIL, threads wait for it and gain nothing."""
        return max(1, 40 * self.iterations // self.elements)

    @property
    def numba_iterations(self) -> int:
        return 25 * self.iterations

    @property
    def sweep_tasks(self) -> int:
        """Tasks of one step of the sweep over task lengths: enough that the pool stays full."""
        return 4 * self.pool

    @property
    def chunk(self) -> int:
        """Tiny tasks sent together: four chunks a worker, so that a slow one does not decide."""
        return max(1, self.tiny_tasks // (4 * self.pool))

    @property
    def payload_elements(self) -> int:
        return self.payload_MiB * 2**18
