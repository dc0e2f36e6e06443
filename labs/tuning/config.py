"""Sizes of the tuning lab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from labs.lab import setting
from labs.tuning.training import HEAD

if TYPE_CHECKING:
    from labs.tuning.schedulers import Scheduler
    from labs.tuning.space import Point
    from labs.tuning.training import Task

EARLY = 6
"""Losses that are taken up to the first rung: what a curve is drawn on from."""
MOST_LOSSES = 20_000
LOOKS = (1, 2, 3, 4, 6, 9)
"""Times half of the first rung: where curves are drawn on to see who goes on."""


@dataclass(frozen=True)
class Config:
    """A search among configurations of AdamW for a small GPT, and the workers that run it."""

    configurations: int = setting(
        27,
        full=81,
        unit="configurations",
        help="drawn at random, the same for every method",
        minimum=2,
        maximum=1000,
    )
    most_steps: int = setting(
        216, full=648, unit="steps", help="of a whole training", minimum=2, maximum=100_000
    )
    least_steps: int = setting(24, full=72, unit="steps", help="the first rung", minimum=1)
    eta: int = setting(3, unit="", help="of so many trials of a rung one goes on", minimum=2, maximum=1000)
    workers: int = setting(2, unit="workers", help="processes that train", minimum=1, maximum=256)
    population: int = setting(
        8, full=16, unit="members", help="of population based training", minimum=2, maximum=1000
    )
    target_nats: float = setting(
        0.02, unit="nats", help="how near to random search's best is near enough", minimum=0.0
    )
    width: int = setting(
        32, unit="numbers", help="width of the GPT; a multiple of 32", minimum=2 * HEAD, maximum=32_768
    )
    layers: int = setting(1, full=2, unit="blocks", help="blocks of the GPT", minimum=1, maximum=100)
    length: int = setting(32, unit="tokens", help="tokens of a sequence", minimum=4, maximum=4096)
    sequences: int = setting(8, unit="sequences", help="of a step", minimum=4, maximum=4096)
    seed: int = setting(0, unit="", help="of configurations, initial values and batches", minimum=0)
    peer_trials: int = setting(
        8, quick=4, unit="trials", help="that Ray Tune runs, and warm workers too", minimum=2, maximum=1000
    )
    together: int = setting(8, unit="trials", help="in one step of JAX", minimum=2, maximum=1024)
    late_probability: float = setting(
        0.2, unit="", help="that a job is late on the simulated workers", minimum=0.0, maximum=1.0
    )
    late_factor: float = setting(
        5.0, unit="", help="times as long as the others takes a job that is late", minimum=1.0
    )
    simulated_workers: int = setting(
        9, unit="workers", help="on the simulated clock", minimum=1, maximum=1000
    )

    def __post_init__(self) -> None:
        if self.width % (2 * HEAD):
            raise ValueError(
                f"tuning: width={self.width} is no multiple of {2 * HEAD}: half of it is heads of {HEAD}"
            )
        if self.most_steps < self.least_steps:
            raise ValueError(
                f"tuning: most_steps={self.most_steps} is below least_steps={self.least_steps}: a whole "
                "training is at least as long as the first rung"
            )
        looked = self.configurations * (self.most_steps // self.least_steps + EARLY)
        if looked > MOST_LOSSES:
            raise ValueError(
                f"tuning: configurations={self.configurations} with a loss every least_steps="
                f"{self.least_steps} of most_steps={self.most_steps} steps are {looked} losses, and searches "
                f"are planned with {MOST_LOSSES} at most: take fewer configurations, or a longer first rung"
            )

    def rungs(self) -> list[int]:
        from labs.tuning.schedulers import rungs

        return rungs(self.least_steps, self.most_steps, self.eta)

    def looks(self) -> list[int]:
        """Steps at which curves are drawn on to their ends: often where all are looked at, rarer later."""
        first = max(1, self.least_steps // 2)
        return [times * first for times in LOOKS if times * first < self.most_steps]

    def milestones(self) -> tuple[int, ...]:
        """Steps after which losses are taken, by every method alike."""
        early = range(0, self.least_steps, max(1, self.least_steps // EARLY))
        found = {*early, *self.rungs(), *self.looks(), *range(0, self.most_steps, self.least_steps)} - {0}
        return tuple(sorted(found))

    def task(self) -> Task:
        from labs.tuning.training import Task

        return Task(self.width, self.layers, self.length, self.sequences, self.milestones(), self.seed)

    def points(self, count: int | None = None) -> list[Point]:
        """So many points, all configurations by default; more begin with the fewer."""
        from labs.tuning.space import draw

        return draw(self.configurations if count is None else count, self.seed)

    def scheduler(self, name: str) -> Scheduler:
        """The search called ``name``, at its beginning."""
        from labs.tuning import schedulers as kinds

        points, least, most, eta = self.points(), self.least_steps, self.most_steps, self.eta
        if name == "random":
            return kinds.RandomSearch(points, most)
        if name == "successive_halving":
            return kinds.SuccessiveHalving(points, least, most, eta)
        if name == "hyperband":
            return kinds.Hyperband(points, least, most, eta)
        if name == "asha":
            return kinds.AsynchronousHalving(points, least, most, eta)
        if name == "asha_extrapolated":
            # Every other rung is left out: the curves say what it would have.
            return kinds.AsynchronousHalving(points, least, most, eta * eta, kinds.by_extrapolation(most))
        if name == "extrapolating":
            return kinds.Extrapolating(points, self.looks(), most, self.target_nats)
        if name == "population":
            return kinds.PopulationBased(self.points(self.population), least, most, self.seed)
        raise ValueError(f"there is no method {name!r}; there is {', '.join(METHODS)}")


METHODS = (
    *("random", "successive_halving", "hyperband", "asha"),
    *("asha_extrapolated", "extrapolating", "population"),
)
