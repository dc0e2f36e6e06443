"""What each stage takes by itself, no pipeline around it: what the predictions of pipelines are made from.

All ranks go through the whole model at once, each for itself, so that they share cores, caches and memory as
the ranks of the pipeline will. Each micro-batch goes forward and, on half of them, backward in one, on the
other half in two halves.

The shortest of all times counts: what disturbs one stage and not another would change the order of schedules,
and disturbs their steps, which are compared in the same rounds, alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from labs.lab import Recorder, Results, Step, values_of

if TYPE_CHECKING:
    from labs.pipeline.config import Config
    from parallel.schedules import Action, Durations, Schedule

GROUP = "stage_times"
EACH = 2  # micro-batches with a full backward, and as many with a split one
KINDS = ("forward", "backward", "input_gradient", "weight_gradient")


def cuts(config: Config) -> tuple[int, int]:
    """Into how many stages the schedules cut the model: one on each rank, or two."""
    return config.stages, 2 * config.stages


def key(count: int, stage: int, kind: str) -> str:
    """How the seconds of stage ``stage`` of ``count`` are recorded."""
    return f"{kind}_{stage}_of_{count}"


def alone(count: int) -> Schedule:
    """Forward and backward through ``count`` stages of one rank, one micro-batch after the other."""
    from parallel.schedules import Action, Kind, Schedule, columns

    actions: list[Action] = []
    for micro in range(2 * EACH):
        ways = [[Kind.BACKWARD], [Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]][micro % 2]
        actions += [Action(Kind.FORWARD, stage, micro) for stage in range(count)]
        actions += [Action(kind, stage, micro) for stage in reversed(range(count)) for kind in ways]
    return Schedule("alone", (0,) * count, 2 * EACH, (columns(actions),))


class _Alone:
    """A step: the whole model, cut in both ways. Its output is the loss of each micro-batch, by either."""

    def __init__(self, config: Config, model: str, recorder: Recorder) -> None:
        import torch.distributed as dist

        from labs.pipeline.real_stages import batch, loss, stages_of
        from parallel.pipeline import Pipeline

        self.group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.recorder, self.batch = recorder, batch(config, model, 2 * EACH)
        self.pipelines = {
            count: Pipeline(stages_of(config, model, count), alone(count), loss, group=self.group)
            for count in cuts(config)
        }
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self()
        self.seconds.clear()  # the first is slower

    def __call__(self) -> Any:
        import torch

        losses = []
        for count, pipeline in self.pipelines.items():

            def note(rank: int, action: Action, begin: float, end: float, count: int = count) -> None:
                self.seconds[key(count, action.stage, KINDS[action.kind])].append(end - begin)

            for parameter in pipeline.parameters():
                parameter.grad = None
            losses.append(pipeline.step(*self.batch, record=note))
        for name, values in self.seconds.items():
            self.recorder.record(name, min(values), "s")
        return torch.cat(losses)

    def close(self) -> None:
        import torch.distributed as dist

        del self.pipelines
        dist.destroy_process_group(self.group)


def setup_of(model: str) -> Callable[[Any, Recorder], Step]:
    return lambda config, recorder: _Alone(config, model, recorder)


def measured(results: Results, model: str, count: int) -> Durations | None:
    """Seconds of the ``count`` stages, or None where they were not measured."""
    from parallel.schedules import Durations

    address = f"{GROUP}/{model}"
    rows: Mapping[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, row in rows.items():
        for stage in range(count):
            values = values_of(results, address, f"{key(count, stage, kind)}_s")
            if not values:
                return None
            row.append(values[-1])
    return Durations(rows["forward"], rows["input_gradient"], rows["weight_gradient"], rows["backward"])
