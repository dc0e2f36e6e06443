"""A trial: a GPT trained with one point of the search space, stopped and gone on with at any step.

All trials of a task begin with the same parameters and see the same batches: what differs between two losses
is the points' doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from labs.tuning.space import Point

if TYPE_CHECKING:
    import torch

    from labs.models.configuration import GPTConfig

State = dict[str, Any]
HEAD = 16  # numbers of an attention head
VALIDATION_SEQUENCES = 32
WARM_UP = 4
"""Steps in which the learning rate rises to the point's."""
EPSILON = 1e-8
FEW = 2
SLOWER = 10
"""Times as long as its first few steps promise a training may take before it is given up."""


@dataclass(frozen=True)
class Task:
    """What every trial trains on. length: tokens; sequences: of a step; milestones: steps after which the
    validation loss is taken, in increasing order; seed: of the initial values and the batches."""

    width: int
    layers: int
    length: int
    sequences: int
    milestones: tuple[int, ...]
    seed: int = 0

    def gpt(self) -> GPTConfig:
        """Without biases: a key's has no gradient but rounding, which Adam would make as large as any."""
        from labs.models.configuration import GPTConfig

        heads = self.width // HEAD
        return GPTConfig(width=self.width, layers=self.layers, heads=heads, context=self.length, bias=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """As on a worker: faster on tensors as small as these, and sums are in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Training:
    """One trial. ``state``: where another one of the same task left off (``Training.state``)."""

    def __init__(self, task: Task, point: Point, state: State | None = None, dtype: Any = None) -> None:
        import torch

        from labs.models.gpt import GPT

        torch.manual_seed(task.seed)
        self.task, self.steps = task, 0
        self.model = GPT(task.gpt()).to(dtype or torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), eps=EPSILON, fused=True)
        self.become(point)
        if state is not None:
            self._restore(state)

    def become(self, point: Point) -> None:
        """Go on with other hyperparameters."""
        self.point = point
        (group,) = self.optimizer.param_groups
        group["betas"] = (1 - point.momentum_loss, 1 - point.variance_loss)
        group["weight_decay"] = point.weight_decay

    def rewind(self, parameters: Sequence[torch.Tensor]) -> None:
        """As it was made, with these parameters."""
        import torch

        self.steps = 0
        self.optimizer.state.clear()
        with torch.no_grad():
            for mine, value in zip(self.model.parameters(), parameters, strict=True):
                mine.copy_(value)

    def _restore(self, state: State) -> None:
        """Parameters and moments are the state's, the hyperparameters this trial's own."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        # What a state keeps may lie in memory that is shared and not to be written: it is copied.
        moments = {
            place: {name: value.clone() for name, value in kept.items()}
            for place, kept in state["moments"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def state(self) -> State:
        """What going on needs, sharing memory with this trial."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "moments": self.optimizer.state_dict()["state"],
        }

    def advance(self, stop: int) -> dict[int, float]:
        """Train up to ``stop`` steps; the validation loss (nats) after each milestone on the way.

        ValueError: ``stop`` is behind already.
        """
        if stop < self.steps:
            raise ValueError(f"stop={stop}, and {self.steps} steps are done: a trial cannot go back")
        losses = {}
        for step in range(self.steps, stop):
            self.optimizer.param_groups[0]["lr"] = self.point.learning_rate * min(1.0, (step + 1) / WARM_UP)
            self.optimizer.zero_grad()
            _loss(self.model, *batch(self.task, step)).backward()
            self.optimizer.step()
            if step + 1 in self.task.milestones:
                losses[step + 1] = self.loss()
        self.steps = stop
        return losses

    def loss(self) -> float:
        """On text that is not trained on, in nats a token."""
        import torch

        with torch.no_grad():
            return float(_loss(self.model, *validation(self.task)))


class InTurn:
    """Trials that are made, to be trained for some steps from their beginning as often as one likes."""

    def __init__(self, task: Task, points: Sequence[Point]) -> None:
        self.trainings = [Training(task, point) for point in points]
        self.begin = [value.detach().clone() for value in self.trainings[0].model.parameters()]

    def losses(self, steps: int) -> list[float]:
        """Of each after ``steps`` steps, in nats."""
        found = []
        for training in self.trainings:
            training.rewind(self.begin)
            training.advance(steps)
            found.append(training.loss())
        return found


def longest_s(task: Task, point: Point, steps: int, now: Callable[[], float]) -> float:
    """Seconds after which so many steps are given up: SLOWER times as many as the first few promise, a
    model's making and a loss among them, once all is warm."""
    seconds = 0.0
    for _ in range(2):
        begin = now()
        training = Training(task, point)
        training.advance(FEW)
        training.loss()
        seconds = now() - begin
    return SLOWER * seconds * steps / FEW


def _loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def batch(task: Task, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) of a step, counted from 0."""
    return _batches(task)[step]


@cache
def _batches(task: Task) -> Any:
    from labs.models.text import Batches, standard_library

    return Batches(standard_library().train, task.sequences, task.length, task.seed)


@cache
def validation(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) that the loss is taken on."""
    from labs.models.text import Batches, standard_library

    drawn = Batches(standard_library().validation, VALIDATION_SEQUENCES, task.length, task.seed)
    return drawn[0]
