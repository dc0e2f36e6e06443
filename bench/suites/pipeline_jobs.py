"""What ``test_pipeline.py`` times on every rank of a world, as functions of this module that make a step:

    virtual_<ours|torch>_<schedule>_<microbatches>   a step on virtual devices, UNIT seconds each F, I and W
    virtual_simulated_<schedule>_<microbatches>      sleeps as long as the simulator says that step takes

A world's default group, gloo, carries the messages of both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from parallel import schedules

UNIT = 0.025
MICROBATCHES = (8,)
WIDTH = 16
TORCH = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "zb_h1": "InterleavedZeroBubble",
    "zb_v": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
"""PyTorch's counterparts, by their names in torch.distributed.pipelining. With one stage a rank,
InterleavedZeroBubble is zb_h1. v_half has none."""

Step = Callable[[], object]


def virtual(side: str, name: str, microbatches: int) -> Step:
    import torch
    import torch.distributed as dist

    from parallel.virtual import sleep_until, virtual_stages

    world_size = dist.get_world_size()
    schedule = schedules.build(name, world_size, microbatches)
    if side == "simulated":
        seconds = schedules.simulate(schedule, schedules.Durations(UNIT, UNIT, UNIT)).step
        return lambda: sleep_until(time.perf_counter() + seconds)
    stages = virtual_stages(schedule.stages, UNIT, UNIT, UNIT)
    inputs, targets = torch.ones(microbatches, WIDTH), torch.ones(microbatches, WIDTH)
    if side == "ours":
        from parallel.pipeline import Pipeline

        pipeline = Pipeline(list(stages), schedule, torch.nn.functional.mse_loss)
        return lambda: pipeline.step(inputs, targets)
    return _of_torch(schedule, stages, inputs, targets)


def _of_torch(schedule: Any, stages: Any, inputs: Any, targets: Any) -> Step:
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    rank, kind = dist.get_rank(), get_schedule_class(TORCH[schedule.name])
    device, count = torch.device("cpu"), schedule.stages
    mine = [PipelineStage(stages[at], at, count, device) for at in schedule.stages_of(rank)]
    is_single = schedule.name in ("gpipe", "1f1b")
    runtime = kind(mine[0] if is_single else mine, schedule.microbatches, torch.nn.functional.mse_loss)
    has_first, has_last = 0 in schedule.stages_of(rank), schedule.stages - 1 in schedule.stages_of(rank)

    def step() -> None:
        arguments = (inputs,) if has_first else ()
        runtime.step(*arguments, target=targets if has_last else None)

    return step


# A world finds what to run by its name.
for _name in schedules.NAMES:
    for _count in MICROBATCHES:
        for _side in ("ours", "torch", "simulated"):
            globals()[f"virtual_{_side}_{_name}_{_count}"] = partial(virtual, _side, _name, _count)
