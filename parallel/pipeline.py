"""Pipeline parallelism: the stages of a model on different ranks, micro-batches going through them.

    stages = [nn.Sequential(...), nn.Sequential(...)]            # the whole model, or None for others' stages
    schedule = schedules.build("1f1b", world_size=2, microbatches=8)
    pipeline = Pipeline(stages, schedule, loss=F.cross_entropy)
    optimizer = torch.optim.AdamW(pipeline.parameters())         # those of this rank's stages
    losses = pipeline.step(inputs, targets)                      # gradients are there
    optimizer.step(), optimizer.zero_grad()

One runtime executes any schedule (``parallel.schedules``): each rank does its actions in order, sends what
another rank needs as soon as it is computed, and has posted receives ahead. Gradients and losses are those of
one process with the whole batch: a micro-batch counts by its samples.

What a rank waits for is an error when it cannot come: the sender has died (at once, by the transport), or did
not come within the group's time-out. A rank that raises in the middle of a step sends zeros to the end of it,
so that nobody waits in vain; then all ranks hear of it and raise the same. Ranks meet twice a step
for that: at its start, over what it is called with, and at its end.

Source: Huang et al. 2019 "GPipe"; Narayanan et al. 2019 "PipeDream", 2021 "Megatron-LM"; the schedules say
theirs.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.liveness import RankLost
from parallel.pipeline_agreement import Meeting, agree, directions
from parallel.pipeline_batch import split_batch
from parallel.pipeline_gradients import AveragedGradients, SharedGradients, shared_by
from parallel.pipeline_program import Program, Record
from parallel.pipeline_stage import Loss, StageRunner
from parallel.schedules import Kind, Schedule, to_text, validate, without_communication
from parallel.together import together

__all__ = ["Pipeline"]


class Pipeline(nn.Module):
    """The stages of this rank, and what makes a step of them with the other ranks'.

    stages: every stage in order; only this rank's are needed, others may be None. A stage takes and gives
        tensors (one, or a tuple), with the samples along the first dimension (or a multiple of them); what it
        gives may change in the number of samples only. Tensors without gradient (masks, tokens) may pass.
    schedule: for as many ranks as the group has, and for these stages. Sends and receives in it are left out:
        the runtime has its own.
    loss: ``loss(output of the last stage, targets)``, one number.
    group: the ranks of this pipeline (the default group). replicas: those with the same stages in other
        pipelines, over which gradients are averaged after each step; on a 2-D mesh,
        ``Pipeline(..., group=mesh.get_group("pipeline"), replicas=mesh.get_group("data"))``.
    shared: weights that several stages have, each as {stage: name of the parameter}; by default those that
        are one tensor in the stages given. They start as the lowest rank's.
    reduction: of ``loss`` over the samples it is given, "mean" or "sum".

    ValueError, on every rank: a schedule for another number of ranks or stages, or one that cannot be
    executed; a missing stage; ranks that were given different schedules.

    peak_in_flight: activations (of a stage and micro-batch) that this rank held at most in the last step.
    early: gradients of weights that came with those of inputs in the last step, though the schedule splits
        them: see ``pipeline_split``.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module | None],
        schedule: Schedule,
        loss: Loss,
        *,
        group: dist.ProcessGroup | None = None,
        replicas: dist.ProcessGroup | None = None,
        shared: Sequence[Mapping[int, str]] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self._group = group or dist.group.WORLD
        self._replicas = replicas if replicas is not None and replicas.size() > 1 else None
        self.rank, self.reduction = self._group.rank(), reduction

        def checked() -> tuple[int, list[dict[int, str]]]:
            _check(stages, schedule, self._group, self.rank, reduction)
            text = to_text(without_communication(schedule))
            names = shared_by(stages) if shared is None else [dict(sorted(one.items())) for one in shared]
            self._mine = {stage: stages[stage] for stage in schedule.stages_of(self.rank)}
            self._shared = SharedGradients(names, self._mine, schedule.placement, self._group)
            return zlib.crc32(text.encode()), names

        answers = together(self._group, checked)
        if any(answer[0] != answers[0][0] for answer in answers):
            raise ValueError("ranks were given different schedules; build the same one on every rank")
        if any(answer[1] != answers[0][1] for answer in answers):
            raise ValueError(
                "ranks know of different shared weights: "
                + "; ".join(f"rank {rank}: {names or 'none'}" for rank, (_, names) in enumerate(answers))
                + "; give them as shared= on every rank"
            )
        self.schedule = without_communication(schedule)
        self.stages = nn.ModuleDict({str(stage): module for stage, module in self._mine.items()})
        self._runners = {stage: StageRunner(stage, module) for stage, module in self._mine.items()}
        self._averaged = (
            AveragedGradients(self.stages, self._replicas) if self._replicas is not None else None
        )
        self._shared.make_equal()
        self._device = next((one.device for one in self.parameters()), torch.device("cpu"))
        self._groups = directions(self._group, self._device)
        self._training = Program(self.schedule, self._runners, self._groups, self._device, loss)
        self._evaluating: Program | None = None
        self._synchronises = True

    @property
    def peak_in_flight(self) -> int:
        return self._training.peak_in_flight

    @property
    def early(self) -> int:
        return sum(runner.early for runner in self._runners.values())

    @property
    def synchronised_bytes(self) -> dict[str, int]:
        """Payload bytes of this rank at the end of a step, for shared weights and replicas."""
        size = self._shared.predict_communication()
        if self._replicas is not None and self._averaged is not None:
            size["send"] = size.get("send", 0) + 8 * (self._replicas.size() - 1)
            size |= self._averaged.predict_communication()
        return size

    def step(
        self, inputs: Any = None, targets: Any = None, *, scale: float = 1.0, record: Record | None = None
    ) -> torch.Tensor:
        """Forward and backward of a batch; gradients are added to what the parameters' ``grad`` have.

        inputs: of the first stage, needed on its rank; targets: of the loss, needed on the last stage's; both
            see ``split_batch``. scale: factor of the gradients (1 / steps, to accumulate over several).
        record: is called with (rank, action, start, end) after each action; seconds of time.perf_counter,
            waiting not included.

        Returns, on every rank, what each micro-batch adds to the loss of the batch: (micro-batches,) float64,
        whose sum is the loss. ValueError, TypeError or RuntimeError, the same on every rank: wrong input, a
        stage that raised or whose output changed its shape. RuntimeError: a rank that died.
        """
        with torch.enable_grad():
            losses = self._run(self._training, inputs, targets, scale, record)
        if self._synchronises:
            if self._averaged is not None:
                self._averaged.average()
            self._shared.sum()
        return losses

    def evaluate(self, inputs: Any = None, targets: Any = None) -> torch.Tensor:
        """The losses of ``step`` without gradients: forward actions only, in the schedule's order."""
        if self._evaluating is None:
            forward = [rank[rank[:, 0] == Kind.FORWARD] for rank in self.schedule.ranks]
            schedule = Schedule(
                self.schedule.name, self.schedule.placement, self.schedule.microbatches, tuple(forward)
            )
            groups, loss = self._groups, self._training.loss
            self._evaluating = Program(schedule, self._runners, groups, self._device, loss)
        with torch.no_grad():
            return self._run(self._evaluating, inputs, targets, 1.0, None)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Steps in here leave gradients as they are on each rank: the first step after it sums those of
        shared weights and averages those of replicas. For all steps of an accumulation but the last."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def _run(
        self, program: Program, inputs: Any, targets: Any, scale: float, record: Record | None
    ) -> torch.Tensor:
        """A step on this pipeline. With replicas all hear of what went wrong in any, since they meet next."""
        error, losses = None, torch.empty(0)
        try:
            losses = self._run_alone(program, inputs, targets, scale, record)
        except RankLost:
            raise
        except Exception as raised:
            if self._replicas is None:
                raise
            error = raised
        if self._replicas is not None:
            agree((self._replicas,) * 2, error, [], "the end of a step, where replicas meet", self._device)
        return losses

    def _run_alone(
        self, program: Program, inputs: Any, targets: Any, scale: float, record: Record | None
    ) -> torch.Tensor:
        count, placement = self.schedule.microbatches, self.schedule.placement
        parts: dict[str, list[Any] | None] = {"inputs": None, "targets": None}
        sizes: dict[str, list[int]] = {name: [0] * count for name in parts}
        error: Exception | None = None
        try:
            for name, batch, stage in (("inputs", inputs, 0), ("targets", targets, len(placement) - 1)):
                if placement[stage] == self.rank:
                    if batch is None:
                        raise ValueError(f"{name} must be given on the rank of stage {stage}, which has none")
                    parts[name], sizes[name] = split_batch(batch, count, name)
        except (ValueError, TypeError) as raised:
            error = raised
        numbers = [*sizes["inputs"], *sizes["targets"]]
        meeting = Meeting(self._groups, error, numbers, "the start of a step", self._device)
        weights = [1.0] * count

        def opening() -> tuple[list[int], list[float]]:
            rows = meeting.wait()
            samples = [int(size) for size in rows[placement[0]][:count]]
            if (of_targets := [int(size) for size in rows[placement[-1]][count:]]) != samples:
                raise ValueError(
                    f"inputs and targets must have the same samples; their micro-batches have {samples} and "
                    f"{of_targets}"
                )
            if self.reduction == "mean":
                weights[:] = [size / sum(samples) for size in samples]
            return samples, [scale * weight for weight in weights]

        if error is not None:
            opening()
        losses = [0.0] * count
        try:
            found = program.run(parts["inputs"], parts["targets"], opening, record)
            if placement[-1] == self.rank:
                losses = torch.stack(found).double().tolist()
        except RankLost:
            raise
        except Exception as raised:
            if not program.is_open:
                raise  # all ranks do
            error = raised
        rows = agree(self._groups, error, losses, "the end of a step", self._device)
        return torch.tensor([rows[placement[-1]], weights], dtype=torch.float64).prod(0)


def _check(
    stages: Sequence[nn.Module | None],
    schedule: Schedule,
    group: dist.ProcessGroup,
    rank: int,
    reduction: str,
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it is 'mean' or 'sum'")
    if schedule.world_size != group.size():
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.world_size} ranks, and the group has "
            f"{group.size()}; build it with world_size={group.size()}"
        )
    if schedule.stages != len(stages):
        raise ValueError(
            f"schedule {schedule.name!r} has {schedule.stages} stages, and {len(stages)} were given; cut the "
            f"model into {schedule.stages}"
        )
    validate(schedule)
    for stage in schedule.stages_of(rank):
        if not isinstance(stages[stage], nn.Module):
            raise TypeError(
                f"stage {stage} is this rank's and is a {type(stages[stage]).__name__}; it must be a module"
            )
