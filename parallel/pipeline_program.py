"""The actions of one rank, in order: what each takes, computes and gives. One Program a schedule and rank.

What can be decided once is, so that an action costs some tens of microseconds beside its computing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.liveness import RankLost
from parallel.pipeline_messages import (
    Boundary,
    Mail,
    Message,
    OtherFailed,
    RankUnreachable,
    boundary_of,
)
from parallel.pipeline_stage import Loss, StageRunner
from parallel.schedules import Action, Kind, Schedule

Record = Callable[[int, Action, float, float], None]
"""Called with (rank, action, start, end) in seconds of ``time.perf_counter``, which all processes of a host
share."""


class _Step(NamedTuple):
    """An action, with what it takes and gives: messages from and to other ranks, or stages of this one."""

    action: Action
    runner: StageRunner
    source: Message | None
    target: Message | None
    receives: bool
    sends: bool


class Program:
    """What ``mail``'s rank does in a step.

    boundaries: what is known of what stages give to the next, by stage. peak_in_flight: of the last step.
    is_open: whether all ranks were ready for the last step.
    """

    def __init__(
        self,
        schedule: Schedule,
        runners: Mapping[int, StageRunner],
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        device: torch.device,
        loss: Loss,
    ) -> None:
        self.rank, self.last = groups[0].rank(), schedule.stages - 1
        self._microbatches = schedule.microbatches
        self.boundaries: dict[int, Boundary] = {}
        self.mail = Mail(schedule, groups, device, self.boundaries)
        self.loss, self._runners = loss, list(runners.values())
        self._steps = []
        for action in schedule.actions(self.rank):
            source, target = _ends(action, self.last)
            self._steps.append(
                _Step(
                    action,
                    runners[action.stage],
                    source,
                    target,
                    source is not None and self.mail.comes(source),
                    target is not None and self.mail.goes(target),
                )
            )
        self._do = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT_GRADIENT: self._backward,
            Kind.WEIGHT_GRADIENT: self._weight_gradient,
        }
        self.peak_in_flight = self._in_flight = 0
        self.is_open = False

    def run(
        self,
        inputs: Sequence[Any] | None,
        targets: Sequence[Any] | None,
        opening: Callable[[], tuple[Sequence[int], Sequence[float]]],
        record: Record | None,
    ) -> list[torch.Tensor]:
        """The losses of the micro-batches, on the rank of the last stage.

        opening: waits until all ranks are ready, and returns the samples of each micro-batch and the factor
            of its loss's gradient; called when the first message is due: the first stage need not wait.
            What it raises all ranks raise. What a stage raises is raised when the others can go on without
            this rank.
        """
        self._inputs, self._targets, self._opening = inputs, targets, opening
        self.is_open = self._opening_failed = False
        self._record, self._begun = record, 0.0
        self._losses: list[torch.Tensor] = [torch.tensor(0.0)] * self._microbatches
        self._here: dict[Message, list[torch.Tensor]] = {}  # from a stage of this rank to another one of it
        self.peak_in_flight = self._in_flight = 0
        for runner in self._runners:
            runner.clear()
        done = 0
        try:
            for step in self._steps:
                self._do[step.action.kind](step)
                done += 1
            if not self.is_open:
                self._open()
            self.mail.finish()
        except RankLost:
            raise
        except Exception:
            if not self.is_open:
                if self._opening_failed:
                    raise
                self._open()
            self._serve_others(self._steps[done:])
            raise
        return self._losses

    def _open(self) -> None:
        """The first message is due."""
        self._opening_failed = True
        self._samples, self._factors = self._opening()
        self.is_open, self._opening_failed = True, False
        self.mail.begin(self._samples)

    def _take(self, step: _Step) -> list[torch.Tensor]:
        if not self.is_open:
            self._open()
        source = step.source
        assert source is not None
        tensors = self.mail.receive(source) if step.receives else self._here.pop(source)
        self._begun = time.perf_counter()
        return tensors

    def _give(self, step: _Step, tensors: list[torch.Tensor], is_first: bool = False) -> None:
        if self._record is not None:
            self._record(self.rank, step.action, self._begun, time.perf_counter())
        if step.target is None:
            return
        if step.sends:
            self.mail.send(step.target, tensors, is_first)
        else:
            self._here[step.target] = tensors

    def _forward(self, step: _Step) -> None:
        _, stage, microbatch = step.action
        inputs: Any
        if step.source is None:
            assert self._inputs is not None
            inputs = self._inputs[microbatch]
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            self._begun = time.perf_counter()
        else:
            inputs = self._take(step)
            for tensor, shape in zip(inputs, self.boundaries[stage - 1], strict=True):
                if shape.has_gradient:
                    tensor.requires_grad_()
        outputs = step.runner.forward(microbatch, inputs)
        if stage == self.last:
            outputs = (self._loss_of(outputs, microbatch),)
            is_first = False
        else:
            if not self.is_open:
                self._open()
            is_first = self._check(outputs, stage, microbatch)
        self._give(step, [one.detach() for one in outputs], is_first)
        if torch.is_grad_enabled():
            step.runner.hold(microbatch, inputs, outputs)
            self._in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)

    def _loss_of(self, outputs: tuple[torch.Tensor, ...], microbatch: int) -> torch.Tensor:
        assert self._targets is not None
        loss = self.loss(outputs[0] if len(outputs) == 1 else outputs, self._targets[microbatch])
        if not isinstance(loss, torch.Tensor) or loss.dim():
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"loss gives {found}; it must give a tensor of one number and no dimension")
        self._losses[microbatch] = loss.detach()
        return loss

    def _check(self, outputs: tuple[torch.Tensor, ...], stage: int, microbatch: int) -> bool:
        """Whether this is the first output of the stage; ValueError where it is unlike the first."""
        samples, known = self._samples[microbatch], self.boundaries.get(stage)
        if known is not None and len(known) == len(outputs):
            for one, shape in zip(outputs, known, strict=True):
                if not shape.fits(one, samples):
                    break
            else:
                return False
        found = boundary_of(outputs, samples, stage)
        if known is None:
            self.boundaries[stage] = found
            return True
        raise ValueError(
            f"stage {stage} gives {' and '.join(map(str, found))} for micro-batch {microbatch}, and gave "
            f"{' and '.join(map(str, known))} at first; only the number of samples may change"
        )

    def _backward(self, step: _Step) -> None:
        kind, _, microbatch = step.action
        if step.source is None:
            self._begun = time.perf_counter()
            if not self.is_open:
                self._open()
            loss = self._losses[microbatch]
            gradients = [loss.new_tensor(self._factors[microbatch])]
        else:
            gradients = self._take(step)
        if kind == Kind.BACKWARD:
            found = step.runner.backward(microbatch, gradients)
            self._in_flight -= 1
        else:
            found = step.runner.input_gradient(microbatch, gradients)
        self._give(step, found)

    def _weight_gradient(self, step: _Step) -> None:
        self._begun = time.perf_counter()
        step.runner.weight_gradient(step.action.microbatch)
        self._in_flight -= 1
        self._give(step, [])

    def _serve_others(self, rest: Sequence[_Step]) -> None:
        """This rank has failed: it takes and sends what the others wait for, without computing."""
        for runner in self._runners:
            runner.clear()
        unreachable = OtherFailed, RankUnreachable  # who has lost a rank serves the others
        for step in rest:
            with contextlib.suppress(*unreachable):
                if step.receives and step.source is not None:
                    self.mail.skip(step.source)
            with contextlib.suppress(*unreachable):
                if step.sends and step.target is not None:
                    self.mail.fail(step.target)
        with contextlib.suppress(*unreachable):
            self.mail.finish()


def _ends(action: Action, last: int) -> tuple[Message | None, Message | None]:
    """What an action takes and gives, if anything, from and to another stage."""
    kind, stage, microbatch = action
    if kind == Kind.WEIGHT_GRADIENT:
        return None, None
    before, after = stage - 1, stage
    direction = Kind.FORWARD if kind == Kind.FORWARD else Kind.BACKWARD
    first_end = Message(direction, before, microbatch) if stage else None
    last_end = Message(direction, after, microbatch) if stage < last else None
    return (first_end, last_end) if kind == Kind.FORWARD else (last_end, first_end)
