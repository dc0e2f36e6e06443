"""Who trains next, and for how long: searches as state machines without clocks and processes.

A runner (``labs.tuning.workers`` on real processes, ``labs.tuning.simulated`` on a simulated clock) asks
``next_job`` for each idle worker, runs the job and hands its losses to ``report``. ``None`` means: nothing
can begin before another report, or ``finished``.
"""

from __future__ import annotations

from labs.tuning.schedulers.asynchronous_halving import AsynchronousHalving
from labs.tuning.schedulers.extrapolating import Extrapolating
from labs.tuning.schedulers.hyperband import Hyperband
from labs.tuning.schedulers.job import Job, Scheduler, by_extrapolation, rungs
from labs.tuning.schedulers.population import PopulationBased
from labs.tuning.schedulers.random_search import RandomSearch
from labs.tuning.schedulers.successive_halving import SuccessiveHalving

__all__ = [
    "AsynchronousHalving",
    "Extrapolating",
    "Hyperband",
    "Job",
    "PopulationBased",
    "RandomSearch",
    "Scheduler",
    "SuccessiveHalving",
    "by_extrapolation",
    "rungs",
]
